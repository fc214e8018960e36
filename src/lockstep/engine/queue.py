"""Requests that wait: first come, first served within a priority, and nobody starves."""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from lockstep.engine.sequence import Sequence

PATIENCE = 64
"""How many later requests of the next better priority may overtake a waiting one."""


class _Place(NamedTuple):
    order: int
    arrival: int
    sequence: Sequence


class Queue:
    """A request of priority p waits as if `PATIENCE * p` others had come before it."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def first(self) -> Sequence:
        """Whose turn it is."""
        return self._places[0].sequence

    def push(self, sequence: Sequence) -> None:
        """Join the queue."""
        order = self._arrivals + PATIENCE * sequence.request.priority
        insort(self._places, _Place(order, self._arrivals, sequence))
        self._arrivals += 1

    def pop(self) -> Sequence:
        """The first one leaves."""
        return self._places.pop(0).sequence

    def remove(self, sequence: Sequence) -> None:
        """This one leaves."""
        self._places = [place for place in self._places if place.sequence is not sequence]
