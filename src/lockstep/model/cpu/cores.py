"""Several cores for one computation: mlx takes one for each operation, but has a thread for each stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx

from lockstep.model.blas import set_threads, threads


@cache
def cores() -> int:
    """As many as OpenBLAS had threads for this rank, which has one left from the first call on.

    Its others would go on polling for work on these cores after each product that it shares out.
    """
    count = threads()
    if count > 1:
        set_threads(1)
    return max(count, 1)


def side_by_side(parts: Sequence[Callable[[], mx.array]]) -> list[mx.array]:
    """What each of `parts` returns, to be computed at the same time on a core each."""
    results = [parts[0]()]
    for part, stream in zip(parts[1:], _more_streams(len(parts) - 1), strict=True):
        with mx.stream(stream):
            results.append(part())
    return results


def _more_streams(count: int) -> list[mx.Stream]:
    while len(_streams) < count:
        _streams.append(mx.new_stream(mx.cpu))
    return _streams[:count]


_streams: list[mx.Stream] = []
