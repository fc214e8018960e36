"""What a model thinks before it answers, told from the answer by mlx-lm's markers for it."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.engine.text import Tokenizer, decode, overlap

TAIL = 16
"""Tokens at the end of a prompt that hold the marker, if its template has begun to think."""


class Reasoning:
    """Splits one answer into what is thought and what is said.

    Only what an answer begins with is thought. White space around it belongs to the markers.
    """

    def __init__(self, start: str, end: str, inside: bool) -> None:
        """`start` and `end` are the markers; `inside` says whether the prompt has begun to think already."""
        self._start, self._end = start, end
        self._undecided = not inside
        self._trims = inside
        self._held = ""
        self.inside = inside
        """Whether the next text is thought."""

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """What is certainly thought, and what is certainly said; all that is left with the `last` text."""
        self._held += text
        if self._undecided:
            self._decide(last)
        thought = self._think(last) if self.inside else ""
        said = "" if self.inside or self._undecided else self._take(len(self._held))
        return thought, said

    def _decide(self, last: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._start):
            self._held = begun.removeprefix(self._start)
            self.inside = self._trims = True
        self._undecided = not (last or self.inside) and self._start.startswith(begun)

    def _think(self, last: bool) -> str:
        before, end, after = self._held.partition(self._end)
        if end:
            self._held = before.rstrip()
            thought = self._take(len(self._held))
            self._held, self.inside, self._trims = after, False, True
            return thought
        certain = len(self._held) if last else len(self._held) - overlap(self._held, self._end)
        return self._take(certain if last else len(self._held[:certain].rstrip()))

    def _take(self, length: int) -> str:
        """So much of what is held, without the white space after a marker."""
        taken, self._held = self._held[:length], self._held[length:]
        taken = taken.lstrip() if self._trims else taken
        self._trims = self._trims and not taken
        return taken


def reasoning(tokenizer: Tokenizer, prompt: Sequence[int]) -> Reasoning | None:
    """What splits the answer to `prompt`; None for a model that is not known to think."""
    if not tokenizer.has_thinking:
        return None
    inside = decode(tokenizer, prompt[-TAIL:]).rstrip().endswith(tokenizer.think_start)
    return Reasoning(tokenizer.think_start, tokenizer.think_end, inside)
