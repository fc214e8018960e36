"""Lanes: the micro-batches that decode, one per pipeline stage, so that every stage has work."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lockstep.engine.mirror import Mirror
from lockstep.engine.sequence import Roster


@dataclass(eq=False, slots=True)
class Lane:
    """One micro-batch. `decodes`: those in flight. `chunks`: prefill steps since its last decode."""

    roster: Roster | None = None
    decodes: int = 0
    chunks: int = 0

    @property
    def size(self) -> int:
        """How many sequences decode here."""
        return len(self.roster.rows) if self.roster else 0


class Lanes:
    """Spreads sequences evenly over the lanes, and says which lane decodes next.

    Rows come and go only at a lane's own step, when the next token of each row is known. A row that
    leaves one lane for another waits in `_ready` until the other's next step, like a new one.
    """

    def __init__(self, count: int, batchable: bool, mirror: Mirror) -> None:
        self._count = count
        self._batchable = batchable
        self._mirror = mirror
        self._lanes = [Lane() for _ in range(count)] if batchable else []
        self._ready: deque[Roster] = deque()

    @property
    def sizes(self) -> list[int]:
        """Sequences per lane."""
        return [lane.size for lane in self._lanes]

    @property
    def sole(self) -> Lane | None:
        """The lane that has all rows; None if others have some, or some wait to join it."""
        filled = [lane for lane in self._lanes if lane.size]
        return filled[0] if len(filled) == 1 and not self._ready else None

    @property
    def may_prefill(self) -> bool:
        """Whether no sequence has waited for as many prefill steps as there are stages since its last decode.

        Fewer would leave stages idle, as their steps take different times. Each stage takes its part of a
        chunk's time, so the wait for the next token stays below that of two chunks.
        """
        return not self._ready and all(lane.chunks < self._count or not lane.size for lane in self._lanes)

    def note_prefill(self) -> None:
        """A prefill step goes out."""
        for lane in self._lanes:
            lane.chunks += 1

    def add(self, roster: Roster) -> None:
        """These rows are prefilled: they decode from the next free lane on."""
        self._ready.append(roster)

    def next(self) -> Lane | None:
        """The lane to decode now, evenly filled; lanes take turns."""
        if not self._batchable:
            self._open_lanes()
        if sum(lane.decodes > 0 for lane in self._lanes) == self._count:
            return None
        for lane in self._lanes:
            if lane.decodes:
                continue
            if self._batchable:
                self._balance(lane)
            if lane.size:
                self._lanes.remove(lane)
                self._lanes.append(lane)
                return lane
        return None

    def drop_empty(self) -> None:
        """Forget the batches whose last row has left."""
        if any(not roster.rows for roster in self._ready):
            self._ready = deque(roster for roster in self._ready if roster.rows)
        for lane in self._lanes:
            if not lane.size:
                lane.roster = None

    def _open_lanes(self) -> None:
        """Sequences that cannot share a batch: a lane for each."""
        self._lanes = [lane for lane in self._lanes if lane.size or lane.decodes]
        while self._ready:
            self._lanes.append(Lane(self._ready.popleft()))

    def _balance(self, lane: Lane) -> None:
        """Give away rows above this lane's share, or take ready ones up to it."""
        share = self._share(lane)
        if lane.roster and lane.size > share:
            self._ready.appendleft(self._mirror.move(None, lane.roster, share, lane.size))
            if share == 0:
                lane.roster = None
        while self._ready and lane.size < share:
            source = self._ready[0]
            taken = min(len(source.rows), share - lane.size)
            if taken == len(source.rows):
                self._ready.popleft()
            lane.roster = self._mirror.move(lane.roster, source, 0, taken)

    def _share(self, lane: Lane) -> int:
        """An even part of all rows; the remainder goes to the lanes that have it already or ask first."""
        rows = sum(self.sizes) + sum(len(roster.rows) for roster in self._ready)
        low, extra = divmod(rows, self._count)
        larger = sum(other.size > low for other in self._lanes if other is not lane)
        return low + (larger < extra)
