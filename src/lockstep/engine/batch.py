"""A batch: sequences that are computed together, and this rank's KV caches for them.

One row keeps mlx-lm's plain caches, whose masks are cheaper; more rows are merged into batched ones.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache

Caches = list[Any]


def compact(caches: Caches) -> Caches:
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
    """`caches` has one entry per layer of this rank; each holds all rows."""

    def __init__(self, caches: Caches, rows: int = 1, merged: bool = False) -> None:
        self.caches = caches
        self.rows = rows
        self._merged = merged

    @classmethod
    def of_rows(cls, rows: list[Caches]) -> Batch:
        """A batch from single-sequence caches, which may be empty."""
        if len(rows) == 1:
            return cls(rows[0])
        merged = [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]
        return cls(merged, len(rows), merged=True)

    def join(self, other: Batch) -> None:
        """Move the other batch's rows behind mine."""
        for mine, theirs in zip(self._merge().caches, other._merge().caches, strict=True):
            mine.extend(theirs)
        self.rows += other.rows

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        if rows == list(range(self.rows)):
            return
        indices = mx.array(rows)
        for cache in self._merge().caches:
            cache.filter(indices)
        self.rows = len(rows)

    def take(self, rows: list[int]) -> Batch:
        """Remove these rows; returns them, in this order, as a batch of their own."""
        if len(rows) == self.rows:
            self.keep(rows)
            taken, self.rows = Batch(self.caches, self.rows, self._merged), 0
            return taken
        taken = Batch.of_rows([self.row(index) for index in rows])
        self.keep([index for index in range(self.rows) if index not in rows])
        return taken

    def row(self, index: int) -> Caches:
        """A copy of one row's caches, as a single sequence."""
        if self._merged:
            return [cache.extract(index) for cache in self.caches]
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

    def _merge(self) -> Batch:
        if not self._merged:
            self.caches = [cache.merge([cache]) for cache in self.caches]
            self._merged = True
        return self
