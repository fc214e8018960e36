"""Prompts that wait: which are prefilled together, in chunks of what size, until they decode."""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from typing import NamedTuple

from lockstep.engine.lanes import Lanes
from lockstep.engine.limits import Limits
from lockstep.engine.memory import Memory
from lockstep.engine.mirror import Mirror
from lockstep.engine.queue import Queue
from lockstep.engine.sequence import Roster, Sequence
from lockstep.engine.step import Prefill

SCORED_CHUNK = 64
"""Tokens of a prefill whose logits are all needed: each takes the memory of the whole vocabulary."""

SHORT_CHUNK = 128
"""Tokens, nearly, for which a prefill step is still worth its weights' reading."""

CHUNKS_PER_STAGE = 2
"""Into which what is left of a prompt that comes alone is cut: stages wait for each other as long as the
longest chunk takes, and the later a chunk, the more tokens each of its own attends to."""


class Chunk(NamedTuple):
    """A prefill step: its sequences in row order, and the position of its first token."""

    forward: Prefill
    rows: Sequenced[Sequence]
    start: int


class Prefills:
    """Prompts from the queue to the lanes, as far as there is memory; short ones together."""

    def __init__(self, limits: Limits, waiting: Queue, memory: Memory, mirror: Mirror, lanes: Lanes) -> None:
        self._limits = limits
        self._waiting = waiting
        self._memory = memory
        self._mirror = mirror
        self._lanes = lanes
        self._roster: Roster | None = None

    @property
    def due(self) -> bool:
        """Whether there is a prompt to prefill, or to admit."""
        return bool(self._waiting or self._roster)

    def admit(self, requests: int) -> None:
        """Start waiting requests, first come first served, until one prefill step is full.

        `requests` are here, waiting ones included. Whose prompt is all in the prefix cache decodes at once.
        """
        if self._roster:
            return
        group: list[Sequence] = []
        most = self._group_size(requests)
        while self._waiting and requests - len(self._waiting) < self._limits.capacity:
            sequence = self._waiting.first
            if not self._memory.has_room(sequence):
                break
            self._memory.look_up(sequence)
            if sequence.pending and group and not (len(group) < most and self._fits(sequence, group)):
                break
            self._memory.take(self._waiting.pop())
            if sequence.pending:
                group.append(sequence)
            else:
                self._lanes.add(sequence.roster or self._mirror.create([sequence]))
        if group:
            self._roster = self._mirror.gather(group)

    def next(self) -> Chunk | None:
        """The next tokens of the prompts that were admitted; None without any."""
        if self._roster is None:
            return None
        rows, start = self._roster.rows, self._roster.rows[0].cached
        most = self._chunk_size(rows)
        chunks = [sequence.take_pending(most) for sequence in rows]
        self._lanes.note_prefill()
        return Chunk(Prefill(self._roster.batch, chunks, rows[0].wants_prompt_logprobs), rows, start)

    def end(self) -> None:
        """Prompts that are in the cache are kept for others, and decode from now on."""
        if self._roster is None or any(sequence.pending for sequence in self._roster.rows):
            return
        for sequence in self._roster.rows:
            self._memory.save(sequence)
        self._lanes.add(self._roster)
        self._roster = None

    def drop_empty(self) -> None:
        """Forget the batch if its last row has left."""
        if self._roster and not self._roster.rows:
            self._roster = None

    def _chunk_size(self, rows: Sequenced[Sequence]) -> int:
        """Tokens of each prompt in the next step: fewer while no other prompt fills the stages."""
        most = self._limits.prefill_chunk
        if rows[0].wants_prompt_logprobs:
            return min(most, SCORED_CHUNK)
        if self._limits.lanes == 1 or self._waiting:
            return most
        longest = max(len(sequence.pending) for sequence in rows)
        chunks = min(round(longest / SHORT_CHUNK), CHUNKS_PER_STAGE * self._limits.lanes)
        return min(most, -(-longest // max(chunks, 1)))

    def _group_size(self, requests: int) -> int:
        """How many short prompts to prefill together: at most what will be one lane's part of all."""
        part = -(-requests // self._limits.lanes)
        return min(self._limits.prefill_rows, part) if self._limits.batchable else 1

    def _fits(self, sequence: Sequence, group: list[Sequence]) -> bool:
        """Whether one step can prefill all these whole, and none had better reuse another's prefix."""
        together = [*group, sequence]
        longest = max(len(member.pending) for member in together)
        if longest * len(together) > self._limits.prefill_chunk:
            return False
        if any(member.wants_prompt_logprobs for member in together):
            return False
        return not any(self._memory.would_share(member, sequence) for member in group)
