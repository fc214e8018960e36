"""The process that tries a grammar out: whatever it is asked, the answer comes in time."""

from __future__ import annotations

import asyncio
import time

import pytest

from lockstep.engine.grammar import json_grammar, lark_grammar
from lockstep.server import examiner
from lockstep.server.examine import Question

VOCABULARY = 330


def refusal(folder, *grammars, vocab_size=VOCABULARY):
    async def ask():
        asked = examiner.Examiner()
        return [await asked.refusal(Question(g, str(folder), vocab_size, [1])) for g in grammars]

    return asyncio.run(ask())


def chain(links):
    """Each definition refers to the next one."""
    definitions = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(links)}
    return {"$defs": definitions | {f"a{links}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def test_a_usual_schema_can_be_followed(folder):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    assert refusal(folder, json_grammar(schema), lark_grammar(['start: "a" | "b"'])) == ["", ""]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"properties": 3}, "must be an object"),
        ({"not": {}}, "not"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "fuel exhausted"),
        ({"$ref": "#"}, "too complex"),
        ({"enum": ["x" * 70_000]}, "at most 64000"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_schema_that_cannot_be_followed_is_refused(folder, schema, reason):
    (said,) = refusal(folder, json_grammar(schema))
    assert reason in said


def test_a_schema_that_crashes_the_compiler_crashes_nothing_else(folder, monkeypatch):
    monkeypatch.setattr(examiner, "LONGEST", 10**6)
    assert refusal(folder, json_grammar(chain(20_000))) == ["it is too complex to be compiled"]


def test_a_schema_that_takes_long_to_compile_is_given_up(folder):
    slow = {"type": "integer", "multipleOf": 999_983}  # 10 s
    began_s = time.monotonic()
    assert refusal(folder, json_grammar(slow)) == ["it is too complex to be compiled"]
    assert time.monotonic() - began_s < examiner.DEADLINE_S


def test_a_tokenizer_that_llguidance_does_not_know_is_told(folder, tmp_path):
    grammar = json_grammar({"type": "integer"})
    assert "too small" in refusal(folder, grammar, vocab_size=100)[0]
    assert "No such file" in refusal(tmp_path, grammar)[0]


def test_an_answer_is_remembered(folder, monkeypatch):
    asked = []

    async def ask(question):
        asked.append(question.grammar)
        return "no"

    monkeypatch.setattr(examiner, "_ask", ask)
    monkeypatch.setattr(examiner, "REMEMBERED", 2)
    assert refusal(folder, "a", "b", "a", "c", "a") == ["no"] * 5
    assert asked == ["a", "b", "c", "a"]
