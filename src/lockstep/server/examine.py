"""Finds out whether a grammar can be followed: a program of its own, which a schema may crash or hold up.

Reads a question from its input and writes the reason why not, or nothing, to its output.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import msgspec

from lockstep.engine.grammar import Grammars, lark_grammar
from lockstep.engine.request import Request, Sampling
from lockstep.engine.sequence import Sequence

CPU_S = 4
"""Beyond which the system ends this process."""

MEMORY_BYTES = 4 << 30

MOST_S = 1.0
"""To compile a grammar and find its first tokens: so long all streams wait for rank 0, which does it, too."""


class Question(msgspec.Struct):
    """What the engine would do with this grammar."""

    grammar: str
    folder: str
    vocab_size: int
    stop_tokens: list[int]


def answer(question: Question) -> str:
    """Why the grammar cannot be followed; empty if it can."""
    grammars = Grammars(Path(question.folder), question.vocab_size)
    for grammar in (lark_grammar(['start: "a"']), question.grammar):  # The first reads the tokenizer.
        began_s = time.process_time()
        request = Request(
            id="",
            prompt=[0],
            max_tokens=1,
            stop_tokens=question.stop_tokens,
            sampling=Sampling(grammar=grammar),
        )
        if reason := grammars.refusal(request):
            return reason
        row = Sequence(request, 1)
        grammars.allowed(row)
        if row.astray:
            return "it is too complex"
    took_s = time.process_time() - began_s
    return f"it takes {took_s:.1f} s to compile, at most {MOST_S:g} s are allowed" if took_s > MOST_S else ""


def main() -> None:
    os.nice(10)  # The ranks may need this core.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "darwin":  # It does not keep this limit.
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write(answer(msgspec.json.decode(sys.stdin.buffer.read(), type=Question)))


if __name__ == "__main__":
    main()
