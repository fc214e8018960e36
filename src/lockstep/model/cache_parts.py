"""What a cache is made of: that of a layer with several states, like mlx-lm's CacheList, has caches in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def members(cache: Any) -> Sequence[Any]:
    """The caches directly in `cache`; none where it is not made of others."""
    return getattr(cache, "caches", ())


def nodes(cache: Any) -> Iterator[Any]:
    """`cache` itself and all caches in it, each before its own members."""
    yield cache
    for member in members(cache):
        yield from nodes(member)


def leaves(cache: Any) -> Iterator[Any]:
    """The caches that hold something themselves: `cache`, unless it is made of others."""
    return (node for node in nodes(cache) if not hasattr(node, "caches"))
