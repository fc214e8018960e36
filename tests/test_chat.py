"""`lockstep chat`, driven through its standard input."""

from __future__ import annotations

import json
from pathlib import Path

from command import lockstep


def test_a_conversation_remembers_forgets_and_can_be_saved(tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    lines = [
        "What is the capital of France?",
        "/reset",
        "What is the capital of France?",
        "Thanks!",
        f"/save {saved}",
        "/save /no/such/folder/chat.json",
        "/save ~no-such-user/chat.json",
        "/what",
    ]
    result = lockstep("chat", "-n", "2", stdin="\n".join(lines) + "\n")
    assert result.status == 0, result.stderr
    assert not result.left
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == "The capital of France is Paris."
    assert result.stdout.count("The capital of France is Paris.") >= 2
    assert "cannot write /no/such/folder/chat.json" in result.stdout
    assert "cannot write ~no-such-user/chat.json" in result.stdout
    assert "/reset forgets" in result.stdout
