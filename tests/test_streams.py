"""Standard streams that are closed, full or cannot be read: a true exit status, no traceback, no waiting."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster import tiny_checkpoint
from command import lockstep, through
from ranks import SOURCE, clean_env


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(redirection: str, model: str) -> None:
    """Of one rank, which probes its BLAS, and of two."""
    for n in ("1", "2"):
        arguments = ("Hi", "-n", n, "--model", model, "--max-tokens", "2")
        result = lockstep("generate", *arguments, before=through(redirection), timeout_s=40)
        assert result.status == 0, result.stderr
        assert "Traceback" not in result.stderr
        assert (result.stdout != "") == (">&-" not in redirection.split())
        assert not result.left


@pytest.mark.parametrize(
    "command", [["plan"], ["generate", "--help"], ["generate", "Hi", "-n", "2", "--dry-run"]]
)
def test_standard_output_without_room_is_told_in_one_line(command: list[str]) -> None:
    result = lockstep(*command, before=through(">/dev/full"))
    assert result.status == 1
    assert result.stderr == "lockstep: error: cannot write to standard output: No space left on device\n"


def test_standard_error_without_room_changes_no_exit_status() -> None:
    result = lockstep("plan", "-n", "31", before=through("2>/dev/full"))
    assert (result.status, result.stdout) == (2, "")


def test_a_prompt_that_cannot_be_read_is_refused() -> None:
    result = lockstep("generate", before=through("0>/dev/null"))
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr == (
        "lockstep: error: cannot read the prompt from standard input: Bad file descriptor\n"
    )


INTERRUPTED = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

from lockstep.cli import main
sys.meta_path.insert(0, Interrupt())
sys.argv = ["lockstep", "generate", "hello"]
main()
"""


def test_an_interrupt_while_the_program_is_imported_is_silent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env=clean_env() | {"PYTHONPATH": os.fspath(SOURCE)},
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
