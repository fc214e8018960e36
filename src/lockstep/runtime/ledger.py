"""The ledger: which steps this rank has executed, as an index and a running digest of all of them.

Rank 0 compares every other rank's mark with its own. Ranks that execute the same steps have the same marks;
once two differ they differ for ever, so the next report shows it.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque

import msgspec

from lockstep.engine.step import Step

KEPT_MARKS = 4096
"""How far behind rank 0 another rank may be and still be compared."""

SHOWN_STEPS = 5


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """All steps up to `index`, in one number. Index -1: none yet."""

    index: int = -1
    digest: int = 0


class Ledger:
    """Written by the thread that executes steps; other threads may read."""

    def __init__(self) -> None:
        self.mark = Mark()
        self._marks: OrderedDict[int, int] = OrderedDict({-1: 0})
        self._last: deque[Step] = deque(maxlen=SHOWN_STEPS)
        self._encode = msgspec.msgpack.Encoder().encode

    def record(self, step: Step) -> None:
        """This step is about to be executed."""
        self.mark = Mark(step.index, zlib.crc32(self._encode(step), self.mark.digest))
        self._marks[step.index] = self.mark.digest
        self._last.append(step)
        if len(self._marks) > KEPT_MARKS:
            self._marks.popitem(last=False)

    def contradicts(self, other: Mark) -> bool:
        """Whether another rank that stood at `other` has executed other steps than this one.

        A mark that this rank has not reached, or has forgotten, contradicts nothing.
        """
        digest = self._marks.get(other.index)
        return digest is not None and digest != other.digest

    def last(self) -> str:
        """The last few steps, in words, oldest first."""
        return "; ".join(describe(step) for step in list(self._last)) or "none"


def describe(step: Step) -> str:
    """A step in a few words: `7 Decode(batch=3, tokens=[5, 9])`."""
    edits = [type(edit).__name__ for edit in step.edits]
    text = str(step.forward) if step.forward else "edits only"
    short = text if len(text) <= 80 else text[:76] + "...)"
    return f"{step.index} {' '.join([*edits, short])}"
