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
"""For the grammar, beyond which the system ends this process."""

MEMORY_BYTES = 4 << 30

MOST_S = 1.0
"""To compile a grammar and find its first tokens: so long all streams wait for rank 0, which does it, too."""


class Question(msgspec.Struct):
    """What the engine would do with this grammar."""

    grammar: str
    folder: str
    vocab_size: int
    stop_tokens: list[int]


def main() -> None:
    os.nice(10)  # The ranks may need this core.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "darwin":  # It does not keep this limit.
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    grammars = Grammars(Path(question.folder), question.vocab_size)
    # Reading a large tokenizer takes seconds, which say nothing about the grammar.
    reason = _refusal(grammars, question, lark_grammar(['start: "a"']))
    if not reason:
        began_s = time.process_time()
        most_s = int(began_s) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (most_s, most_s))
        reason = _refusal(grammars, question, question.grammar)
        took_s = time.process_time() - began_s
        if not reason and took_s > MOST_S:
            reason = f"it takes {took_s:.1f} s to compile, at most {MOST_S:g} s are allowed"
    sys.stdout.write(reason)


def _refusal(grammars: Grammars, question: Question, grammar: str) -> str:
    """Why this grammar cannot be compiled, or its first tokens not be found; empty if they can."""
    sampling = Sampling(grammar=grammar)
    request = Request(id="", prompt=[0], max_tokens=1, stop_tokens=question.stop_tokens, sampling=sampling)
    if reason := grammars.refusal(request):
        return reason
    row = Sequence(request, request.max_tokens)
    grammars.allowed(row)
    return "it is too complex" if row.astray else ""


if __name__ == "__main__":
    main()
