"""Several cores for one computation: mlx takes one for each operation, but has a thread for each stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from lockstep.model.blas import AVX512, kernels, set_threads, threads


@cache
def cores() -> int:
    """As many as OpenBLAS had threads for this rank, which has one left from the first call on.

    Its others would go on polling for work on these cores after each product that it shares out. One where
    its kernels are not for AVX-512: there it shares out products well itself, and keeps its threads.
    """
    count = threads() if kernels() in AVX512 else 1
    if count > 1:
        set_threads(1)
    return count


def on_cores(compute: Callable[[int, int], mx.array], units: int, worth: int, axis: int) -> mx.array:
    """`compute(0, units)`, in as many parts as it is `worth` cores, if there are so many.

    Each part, from its first unit up to its last, is computed at the same time as the others; along `axis`
    they make the whole.
    """
    parts = max(min(cores(), worth, units), 1)
    if parts == 1:
        return compute(0, units)
    computed = []
    for part, stream in enumerate([mx.default_stream(mx.cpu), *_more_streams(parts - 1)]):
        with mx.stream(stream):
            computed.append(compute(units * part // parts, units * (part + 1) // parts))
    return mx.concatenate(computed, axis)


def _more_streams(count: int) -> list[mx.Stream]:
    while len(_streams) < count:
        _streams.append(mx.new_stream(mx.cpu))
    return _streams[:count]


_streams: list[mx.Stream] = []
