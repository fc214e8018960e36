"""What the caches of a shard take: measured on its own caches, so that it holds for any mixture of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import mlx.core as mx
from mlx.utils import tree_flatten

from lockstep.model.cache_parts import leaves
from lockstep.model.shard import Shard


@dataclass(frozen=True)
class KvRoom:
    """Bytes of cache. `windows` has those per token by the number of tokens that such a cache keeps."""

    per_token: int
    windows: Mapping[int, int]
    per_row: int
    """Of the states that do not grow."""

    def tokens(self, free_bytes: int, rows: int) -> int:
        """The most tokens, of up to `rows` sequences together, that `free_bytes` surely hold.

        States that do not grow get no more than half: where so many rows of them do not fit, a few still do.
        """
        free = free_bytes - min(rows * self.per_row, max(free_bytes, 0) // 2)
        fitting = [0]
        # A window is either counted full for all rows, or as if it grew: whatever leaves most room is right.
        for longest in (0, *self.windows):
            full = sum(rows * size * each for size, each in self.windows.items() if size <= longest)
            growing = sum(each for size, each in self.windows.items() if size > longest)
            fitting.append((free - full) // max(self.per_token + growing, 1))
        return max(fitting)


def kv_room(shard: Shard) -> KvRoom:
    """Measured by a pass over one token, which is never computed."""
    from mlx_lm.models.cache import ArraysCache

    caches = shard.make_cache()
    shard.forward(mx.zeros((1, 1), mx.int32), caches)
    per_token = per_row = 0
    windows: Counter[int] = Counter()
    for cache in chain.from_iterable(map(leaves, caches)):
        arrays = [leaf for _, leaf in tree_flatten(cache.state) if isinstance(leaf, mx.array)]
        if isinstance(cache, ArraysCache):
            per_row += sum(array.nbytes for array in arrays)
            continue
        # Keys and values are [rows, heads, length, width]; some caches have no heads.
        growing = sum(array.nbytes // array.shape[-2] for array in arrays if array.ndim > 2 and array.size)
        if window := getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None):
            windows[window] += growing
        else:
            per_token += growing
    return KvRoom(per_token, windows, per_row)
