"""Which waiting prompts a prefill step takes, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence as Sequenced

from lockstep.engine.limits import Limits
from lockstep.engine.memory import Memory
from lockstep.engine.queue import Queue
from lockstep.engine.sequence import Sequence

SCORED_CHUNK = 64
"""Tokens of a prefill whose logits are all needed: each takes the memory of the whole vocabulary."""

SHORT_CHUNK = 128
"""Tokens, nearly, for which a prefill step is still worth its weights' reading."""

CHUNKS_PER_STAGE = 2
"""Into which what is left of a prompt that comes alone is cut: stages wait for each other as long as the
longest chunk takes, and the later a chunk, the more tokens each of its own attends to."""


class Prefills:
    """Takes prompts from the queue as far as there is memory, short ones together."""

    def __init__(self, limits: Limits, waiting: Queue, memory: Memory) -> None:
        self._limits = limits
        self._waiting = waiting
        self._memory = memory

    def admit(self, requests: int) -> list[Sequence]:
        """Start waiting requests, first come first served, until one prefill step is full.

        `requests` are here, those included that wait. Of the sequences returned some have nothing `pending`:
        all of their prompt was in the prefix cache.
        """
        admitted: list[Sequence] = []
        group: list[Sequence] = []
        most = self._group_size(requests)
        while self._waiting and requests - len(self._waiting) < self._limits.capacity:
            sequence = self._waiting.first
            if not self._memory.has_room(sequence):
                break
            self._memory.look_up(sequence)
            if sequence.pending:
                if group and not (len(group) < most and self._fits(sequence, group)):
                    break
                group.append(sequence)
            self._memory.take(self._waiting.pop())
            admitted.append(sequence)
        return admitted

    def chunk_size(self, rows: Sequenced[Sequence]) -> int:
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
