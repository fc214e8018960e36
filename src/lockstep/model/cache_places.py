"""The caches of one stage, and what stands in for those of the others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from lockstep.model.cache_parts import leaves, members
from lockstep.model.structure import Structure


class CachePlaces:
    """Where a stage's caches stand in the list that the model expects.

    Code around the layers asks caches for masks and offsets by position. All caches have seen the same
    tokens, so at another stage's position one of the same kind answers alike. Where this stage has none of
    that kind, it keeps one more that is fed one-number keys, only to count.
    """

    def __init__(self, structure: Structure, span: tuple[int, int]) -> None:
        first, last = span
        owned = [layer is None or first <= layer < last for layer in structure.cache_layers]
        self._fresh = [cache for cache, own in zip(structure.caches, owned, strict=True) if own]
        self._counters = len(self._fresh)
        by_kind: dict[Any, int] = {}
        for i, cache in enumerate(self._fresh):
            by_kind.setdefault(_kind(cache), i)
        own_places = iter(range(len(self._fresh)))
        self._places: list[int | Any] = []
        for cache, own in zip(structure.caches, owned, strict=True):
            kind = _kind(cache)
            if not own and kind not in by_kind and any(_counting(cache)):
                by_kind[kind] = len(self._fresh)
                self._fresh.append(cache)
            self._places.append(next(own_places) if own else by_kind.get(kind, cache))

    def make(self) -> list[Any]:
        return [copy.deepcopy(cache) for cache in self._fresh]

    def spread(self, cache: list[Any]) -> list[Any]:
        """The model's list, from this stage's."""
        assert len(cache) == len(self._fresh), (len(cache), len(self._fresh))
        return [cache[p] if isinstance(p, int) else p for p in self._places]

    def count(self, cache: list[Any], rows: int, length: int) -> None:
        for counter in cache[self._counters :]:
            for part in _counting(counter):
                part.update_and_fetch(*[mx.zeros((rows, 1, length, 1))] * 2)


def _kind(cache: Any) -> Any:
    sizes = [getattr(cache, name, None) for name in ("max_size", "chunk_size", "keep")]
    return type(cache), *sizes, *map(_kind, members(cache))


def _counting(cache: Any) -> Iterator[Any]:
    return (part for part in leaves(cache) if hasattr(part, "update_and_fetch"))
