"""Rank 0's picture of the caches on every rank, as they will be once all edits so far have run.

Every method makes one edit and does to the rosters what the edit does to the caches, so that the two
cannot drift apart.
"""

from __future__ import annotations

from itertools import count

from lockstep.engine.sequence import Roster, Sequence
from lockstep.engine.step import Create, Edit, Evict, Keep, Move, Restore, Save


class Mirror:
    """Collects edits for the next step and hands out batch ids."""

    def __init__(self) -> None:
        self._edits: list[Edit] = []
        self._ids = count()

    @property
    def edited(self) -> bool:
        """Whether edits wait for a step to carry them."""
        return bool(self._edits)

    def take_edits(self) -> list[Edit]:
        """The edits since the last call, in order."""
        edits, self._edits = self._edits, []
        return edits

    def create(self, sequences: list[Sequence]) -> Roster:
        """A new batch with an empty row for each sequence."""
        roster = Roster(next(self._ids), sequences)
        self._edits.append(Create(roster.batch, len(sequences)))
        return roster

    def restore(self, sequence: Sequence, entry: int, tokens: int) -> Roster:
        """A new batch of one row, which begins with `tokens` tokens of a prefix-cache entry."""
        roster = Roster(next(self._ids), [sequence])
        self._edits.append(Restore(roster.batch, entry, tokens))
        sequence.cached = sequence.reused = tokens
        return roster

    def move(self, target: Roster | None, source: Roster, first: int, end: int) -> Roster:
        """Rows first..end of `source` go behind the rows of `target`; None makes a new batch."""
        if target is None:
            if first == 0 and end == len(source.rows):
                return source
            target = Roster(next(self._ids), [])
        self._edits.append(Move(target.batch, source.batch, list(range(first, end))))
        moved = source.rows[first:end]
        source.rows = source.rows[:first] + source.rows[end:]
        target.rows = target.rows + moved
        for sequence in moved:
            sequence.roster = target
        return target

    def gather(self, sequences: list[Sequence]) -> Roster:
        """One batch of sequences that have a batch of their own or none yet."""
        restored = [sequence.roster for sequence in sequences if sequence.roster]
        fresh = [sequence for sequence in sequences if not sequence.roster]
        target = self.create(fresh) if fresh else restored.pop(0)
        for roster in restored:
            self.move(target, roster, 0, len(roster.rows))
        return target

    def drop_finished(self, roster: Roster) -> None:
        """Rows of finished sequences leave; a batch without rows is gone."""
        kept = [row for row, sequence in enumerate(roster.rows) if not sequence.finished]
        self._edits.append(Keep(roster.batch, kept))
        roster.rows = [roster.rows[row] for row in kept]

    def save(self, sequence: Sequence, entry: int) -> None:
        """Copy a sequence's row into the prefix cache."""
        roster = sequence.roster
        assert roster is not None, "only a sequence with a cache can be saved"
        self._edits.append(Save(roster.batch, roster.rows.index(sequence), entry))

    def evict(self, entries: list[int]) -> None:
        """Forget prefix-cache entries."""
        self._edits += [Evict(entry) for entry in entries]
