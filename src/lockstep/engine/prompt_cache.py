"""Which prefixes the ranks keep KV caches of: decided on rank 0 by tokens alone.

Entries are kept in the order of their tokens. The entry that shares most with a prompt is then a
neighbour of the place where the prompt would stand, so a look-up is one bisection.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import count
from typing import NamedTuple

MIN_REUSED = 16
"""Fewer tokens than this are quicker prefilled than restored."""
MIN_GAIN = 32
"""An entry that adds fewer tokens than this to what is there already is not worth its memory."""


class Match(NamedTuple):
    """The first `tokens` tokens of a prompt are those of an entry."""

    entry: int
    tokens: int


class PromptCache:
    """Least recently used out; at most `capacity` tokens.

    Entries that are not `trimmable` to a shorter prefix (sliding windows, recurrent states) serve only
    prompts that begin with all of them.
    """

    def __init__(self, capacity: int, trimmable: bool = True) -> None:
        self.used = 0
        self._capacity = capacity
        self._trimmable = trimmable
        self._entries: dict[int, list[int]] = {}
        self._index = _Index()
        self._ids = count()

    def match(self, prompt: list[int]) -> Match | None:
        """The entry that saves most of this prompt's prefill; None if none saves enough."""
        best = self._index.nearest(prompt) if self._trimmable else self._index.longest_within(prompt)
        return best if best.tokens >= MIN_REUSED else None

    def touch(self, entry: int) -> None:
        """This entry was used just now."""
        self._entries[entry] = self._entries.pop(entry)

    def would_serve(self, saved: list[int], prompt: list[int]) -> bool:
        """Whether an entry of the tokens `saved` would be worth waiting for with this prompt."""
        shared = common_prefix(saved, prompt)
        usable = shared == len(saved) or self._trimmable
        if not usable or shared < MIN_GAIN or len(saved) > self._capacity:
            return False
        found = self.match(prompt)
        return shared >= MIN_GAIN + (found.tokens if found else 0)

    def add(self, tokens: list[int], room: int) -> tuple[int | None, list[int]]:
        """A new entry's id if it is worth its memory and fits, and the entries that go in its favour.

        `room` bounds the tokens of all entries together, besides the capacity.
        """
        room = min(room, self._capacity)
        found = self.match(tokens)
        if found:
            self.touch(found.entry)
        if len(tokens) > room or len(tokens) < MIN_GAIN + (found.tokens if found else 0):
            return None, []
        gone = self._supersede(tokens) + self.shrink(room - len(tokens))
        entry = next(self._ids)
        self._entries[entry] = tokens
        self._index.add(tokens, entry)
        self.used += len(tokens)
        return entry, gone

    def shrink(self, room: int) -> list[int]:
        """Forget the least recently used entries until at most `room` tokens are kept; which ones."""
        gone = []
        while self.used > room:
            entry = next(iter(self._entries))
            self._forget(entry)
            gone.append(entry)
        return gone

    def _supersede(self, tokens: list[int]) -> list[int]:
        """Forget the entry that a longer one which can be trimmed makes needless."""
        shorter = self._index.longest_within(tokens) if self._trimmable else _NOTHING
        if not shorter.tokens:
            return []
        self._forget(shorter.entry)
        return [shorter.entry]

    def _forget(self, entry: int) -> None:
        tokens = self._entries.pop(entry)
        self._index.remove(tokens)
        self.used -= len(tokens)


_NOTHING = Match(-1, 0)


class _Index:
    """Token lists in lexicographic order."""

    def __init__(self) -> None:
        self._keys: list[list[int]] = []
        self._entries: list[int] = []

    def add(self, key: list[int], entry: int) -> None:
        place = bisect_left(self._keys, key)
        self._keys.insert(place, key)
        self._entries.insert(place, entry)

    def remove(self, key: list[int]) -> None:
        place = bisect_left(self._keys, key)
        del self._keys[place], self._entries[place]

    def nearest(self, prompt: list[int]) -> Match:
        """The entry that shares the longest prefix with `prompt`."""
        place = bisect_left(self._keys, prompt)
        neighbours = range(max(place - 1, 0), min(place + 1, len(self._keys)))
        shared = [Match(self._entries[i], common_prefix(self._keys[i], prompt)) for i in neighbours]
        return max(shared, key=lambda match: match.tokens, default=_NOTHING)

    def longest_within(self, prompt: list[int]) -> Match:
        """The longest entry that `prompt` begins with."""
        while place := bisect_right(self._keys, prompt):
            key = self._keys[place - 1]
            shared = common_prefix(key, prompt)
            if shared == len(key):
                return Match(self._entries[place - 1], shared)
            prompt = prompt[:shared]
        return _NOTHING


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two lists share; compares slices, which is much quicker than tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
