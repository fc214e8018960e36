"""Asks another process whether a grammar can be followed, and remembers the answers."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict

import msgspec

from lockstep.server.examine import Question

DEADLINE_S = 15.0
"""For an answer. Most of the usual 0.7 s is that of starting a process, on cores that may be busy."""

LONGEST = 64_000
"""Characters of a grammar; it travels with each of a request's answers."""

REMEMBERED = 256


class Examiner:
    """One question at a time."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._free = asyncio.Lock()

    async def refusal(self, question: Question) -> str:
        """Why the grammar cannot be followed; empty if it can."""
        if len(question.grammar) > LONGEST:
            return f"it has {len(question.grammar)} characters, at most {LONGEST} are possible"
        async with self._free:
            reason = self._answers.get(question.grammar)
            if reason is None:
                reason = self._answers[question.grammar] = await _ask(question)
                if len(self._answers) > REMEMBERED:
                    self._answers.popitem(last=False)
        return reason


async def _ask(question: Question) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lockstep.server.examine"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        told, _ = await asyncio.wait_for(process.communicate(msgspec.json.encode(question)), DEADLINE_S)
    except TimeoutError:
        return f"it takes more than {DEADLINE_S:g} s to compile"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return told.decode(errors="replace") if process.returncode == 0 else "it is too complex to be compiled"
