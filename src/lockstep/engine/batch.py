"""A batch: sequences that are computed together, and this rank's KV caches for them.

One row keeps mlx-lm's plain caches, whose masks are cheaper; more rows are merged into batched ones.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, KVCache

Caches = list[Any]

_UNUSED = 1 / 8
"""Of the places, and of their width: up to this part may be unused before the caches are copied."""


def detached(caches: Caches) -> Caches:
    """The same caches in memory of their own, with room for the tokens that they hold and no more.

    A row that has been cut out of a batch is a view of the batch's memory, or will be, and keeps all of it.
    """
    for cache in caches:
        if type(cache) is KVCache:
            cache.keys, cache.values = (a[..., : cache.offset, :] for a in (cache.keys, cache.values))
        cache.state = tree_map(_copied, cache.state)
        mx.async_eval(cache.state)  # type: ignore[no-untyped-call]
    return caches


def _copied(array: Any) -> Any:
    if not isinstance(array, mx.array) or not array.ndim:
        return array
    return mx.concatenate([array[..., :0], array], axis=-1)


class Batch:
    """`caches` has one entry per layer of this rank; each has a place for every row.

    To take a place out, or to add one, copies all caches. So where the caches allow it (`replaceable`), the
    place of a row that leaves stays: it goes on computing, unseen, until a row that joins takes it over.
    Which places there are depends on the steps alone, so it is the same on all ranks.
    """

    def __init__(self, caches: Caches, tokens: int = 0, replaceable: bool = False) -> None:
        """One row, which has seen `tokens` tokens."""
        self.caches = caches
        self.drawn: mx.array | None = None
        """Tokens [places, 1] that every rank has of the last decode, if they were broadcast."""
        self._replaceable = replaceable
        self._merged = False
        self._lengths = [tokens]  # Of each row, in tokens.
        self._places = [0]  # Of each row in the caches.
        self._room = 1  # Places, with and without a row.
        self._width = tokens  # Of every place: the tokens of a row, and the padding on their left.

    @classmethod
    def of_rows(cls, rows: list[Caches], tokens: list[int] | None = None, replaceable: bool = False) -> Batch:
        """A batch from single-sequence caches, which have seen that many `tokens` each, or none."""
        lengths = tokens or [0] * len(rows)
        batch = cls(rows[0], lengths[0], replaceable)
        if len(rows) > 1:
            batch.caches = [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]
            batch._merged = True
            batch._lengths = lengths
            batch._note_rebuilt()
        return batch

    @property
    def rows(self) -> int:
        """Sequences in it."""
        return len(self._places)

    def spread(self, tokens: mx.array) -> mx.array:
        """One token for each row, as [places, 1]."""
        if not self._settled:
            places = mx.zeros(self._room, tokens.dtype)
            places[mx.array(self._places)] = tokens
            tokens = places
        return tokens[:, None]

    def visible(self, output: mx.array) -> mx.array:
        """What of an output [places, ...] belongs to rows, as [rows, ...]."""
        return output if self._settled else output[mx.array(self._places)]

    def note_seen(self, lengths: list[int]) -> None:
        """The caches have advanced: each row has seen so many tokens more, the shorter ones padded."""
        self._lengths = [seen + more for seen, more in zip(self._lengths, lengths, strict=True)]
        self._width += max(lengths)
        self._write_offsets()

    def join(self, other: Batch) -> None:
        """Move the other batch's rows behind mine."""
        self._merge()
        other.settle()._merge()
        free = sorted(set(range(self._room)) - set(self._places))[: other.rows]
        if self._replaceable and len(free) == other.rows and 0 < other._width <= self._width:
            for mine, theirs in zip(self.caches, other.caches, strict=True):
                _overwrite(mine, free, theirs)
            self._places = self._places + free
        else:
            for mine, theirs in zip(self.caches, other.caches, strict=True):
                mine.extend(theirs)
            self._places = [*self._places, *range(self._room, self._room + other.rows)]
            self._room += other.rows
            self._width = max(self._width, other._width)
        self._lengths = self._lengths + other._lengths

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        if rows == list(range(self.rows)):
            return
        self._lengths = [self._lengths[row] for row in rows]
        self._places = [self._places[row] for row in rows]
        if not self._replaceable or self._mostly_unused:
            self._rebuild()

    def settle(self) -> Batch:
        """Give up the places without a row, and put the others in the order of the rows."""
        if not self._settled:
            self._rebuild()
        return self

    def take(self, rows: list[int]) -> Batch:
        """Remove these rows; returns them, in this order, as a batch of their own."""
        if len(rows) == self.rows:
            self.keep(rows)
            taken, self._places = copy.copy(self), []
            return taken
        lengths = [self._lengths[row] for row in rows]
        taken = Batch.of_rows([self.row(row) for row in rows], lengths, self._replaceable)
        self.keep([row for row in range(self.rows) if row not in rows])
        return taken

    def row(self, index: int) -> Caches:
        """A copy of one row's caches, as a single sequence."""
        if self._merged:
            return [cache.extract(self._places[index]) for cache in self.caches]
        return copy.deepcopy(self.caches)

    def pad_right(self, lengths: list[int]) -> None:
        """Announce that the next tokens are padded on the right up to the longest row."""
        padding = [max(lengths) - length for length in lengths]
        for cache in self.caches:
            cache.prepare(lengths=lengths, right_padding=padding)

    def unpad(self) -> None:
        """Forget the padding announced by `pad_right`, after its forward pass."""
        for cache in self.caches:
            cache.finalize()

    def state(self) -> list[Any]:
        """Everything that must be evaluated for the caches to be up to date: a tree that `mx.eval` takes."""
        return [cache.state for cache in self.caches]

    @property
    def _settled(self) -> bool:
        return self._places == list(range(self._room))

    @property
    def _mostly_unused(self) -> bool:
        places, padding = self._room - self.rows, self._width - max(self._lengths)
        return places > _UNUSED * self._room or padding > _UNUSED * self._width

    def _rebuild(self) -> None:
        indices = mx.array(self._places)
        for cache in self._merge().caches:
            cache.filter(indices)
        self._note_rebuilt()

    def _note_rebuilt(self) -> None:
        self._room, self._width = len(self._lengths), max(self._lengths)
        self._places = list(range(self._room))

    def _write_offsets(self) -> None:
        """Replace offsets that the caches still compute by known lengths: who reads one would wait for it.

        Places without a row get 0, which nobody sees.
        """
        if self._merged and self._replaceable:
            offsets = [0] * self._room
            for place, length in zip(self._places, self._lengths, strict=True):
                offsets[place] = length
            for cache in self.caches:
                cache.offset = mx.array(offsets)

    def _merge(self) -> Batch:
        if not self._merged:
            self.caches = [cache.merge([cache]) for cache in self.caches]
            self._merged = True
        return self


def _overwrite(cache: BatchKVCache, places: list[int], new: BatchKVCache) -> None:
    """Put the rows of `new`, which is no wider than `cache`, in these places of it."""
    keys, values, offset, left_padding, width = cache.state
    new_keys, new_values, new_offset, new_left_padding, new_width = new.state
    padding = width - new_width
    for row, place in enumerate(places):
        keys[place, :, padding:width] = new_keys[row, :, :new_width]
        values[place, :, padding:width] = new_values[row, :, :new_width]
    indices = mx.array(places)
    offset[indices], left_padding[indices] = new_offset, new_left_padding + padding
    cache.state = keys, values, offset, left_padding, width
