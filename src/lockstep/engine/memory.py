"""KV memory, counted in tokens: what running requests may come to need, and what is kept for later ones."""

from __future__ import annotations

from collections.abc import Collection

from lockstep.engine.limits import Limits
from lockstep.engine.mirror import Mirror
from lockstep.engine.prompt_cache import PromptCache
from lockstep.engine.sequence import Sequence


class Memory:
    """Prefix caches use what no request needs, and go as soon as one does."""

    def __init__(self, limits: Limits, mirror: Mirror) -> None:
        self._running: set[Sequence] = set()
        self._limits = limits
        self._mirror = mirror
        self._cache = PromptCache(limits.prompt_cache_tokens, limits.trimmable)

    @property
    def reserved(self) -> int:
        """Tokens set aside for the sequences that run."""
        return self._needed(self._running)

    @property
    def cached(self) -> int:
        """Tokens in prefix caches."""
        return self._cache.used

    def has_room(self, sequence: Sequence) -> bool:
        """Whether a sequence fits beside those that run."""
        return self._needed([*self._running, sequence]) <= self._limits.kv_tokens

    def look_up(self, sequence: Sequence) -> None:
        """Find out how much of a waiting sequence is in the prefix cache, and what is left to prefill."""
        known = sequence.known()[:-1]
        sequence.match = None if sequence.wants_prompt_logprobs else self._cache.match(known)
        sequence.pending = known[sequence.match.tokens :] if sequence.match else known

    def would_share(self, first: Sequence, second: Sequence) -> bool:
        """Whether `second` had better wait until it can reuse what `first` is about to prefill."""
        return self._cache.would_serve(first.known()[:-1], second.known()[:-1])

    def take(self, sequence: Sequence) -> None:
        """Set memory aside; take what is there of the prompt before anything is evicted."""
        self._running.add(sequence)
        if match := sequence.match:
            self._cache.touch(match.entry)
            self._mirror.restore(sequence, match.entry, match.tokens)
        self._mirror.evict(self._cache.shrink(self._limits.kv_tokens - self.reserved))

    def give_back(self, sequence: Sequence) -> None:
        """A running sequence has ended."""
        self._running.remove(sequence)

    def save(self, sequence: Sequence) -> None:
        """Keep a sequence's cache for later requests that begin alike, if there is room."""
        if self._limits.prompt_cache_tokens == 0:
            return
        room = self._limits.kv_tokens - self.reserved
        entry, gone = self._cache.add(sequence.held(), room)
        if entry is not None:
            self._mirror.save(sequence, entry)
        self._mirror.evict(gone)

    def _needed(self, sequences: Collection[Sequence]) -> int:
        """Tokens of memory that these may come to need together: a batch pads its rows to the longest."""
        each = [sequence.reserved for sequence in sequences]
        return len(each) * max(each, default=0) if self._limits.batchable else sum(each)
