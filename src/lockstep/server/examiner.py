"""Asks another process whether a grammar can be followed, and remembers what it says."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict

import msgspec

from lockstep.server.errors import ApiError
from lockstep.server.examine import Question

DEADLINE_S = 15.0
"""For an answer, and for those before it. Most of the usual 0.7 s is that of starting a process, on cores
that may be busy."""

LONGEST = 64_000
"""Characters of a grammar; it travels with each of a request's answers."""

REMEMBERED = 256


class Examiner:
    """One question at a time."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._free = asyncio.Lock()

    async def refusal(self, question: Question) -> str:
        """Why the grammar cannot be followed; empty if it can. Raises `ApiError` 503 if it has no turn."""
        if len(question.grammar) > LONGEST:
            return f"it has {len(question.grammar)} characters, at most {LONGEST} are possible"
        if (known := self._answers.get(question.grammar)) is not None:
            return known
        try:
            await asyncio.wait_for(self._free.acquire(), DEADLINE_S)
        except TimeoutError as error:
            message = f"Other schemas have been tried for {DEADLINE_S:g} s before this one."
            raise ApiError(503, message, code="busy", retry_after_s=DEADLINE_S) from error
        try:
            return await self._examined(question)
        finally:
            self._free.release()

    async def _examined(self, question: Question) -> str:
        if (known := self._answers.get(question.grammar)) is not None:
            return known
        reason, is_certain = await _ask(question)
        if is_certain:
            self._answers[question.grammar] = reason
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
        return reason


async def _ask(question: Question) -> tuple[str, bool]:
    """Why the grammar cannot be followed, and whether the process has said so: it may have been held up."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lockstep.server.examine"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        told, _ = await asyncio.wait_for(process.communicate(msgspec.json.encode(question)), DEADLINE_S)
    except TimeoutError:
        return f"it takes more than {DEADLINE_S:g} s to compile", False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        return "it is too complex to be compiled", False
    return told.decode(errors="replace"), True
