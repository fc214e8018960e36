"""Several cores for one computation: mlx takes one for each operation, but has a thread for each stream."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from lockstep.model.blas import set_threads, threads


def take_cores() -> None:
    """Compute on all cores that OpenBLAS has threads for, and leave it one from now on.

    Its others would go on polling for work on these cores after each product that it shares out.
    """
    global _cores
    if threads() > 1:
        _cores = threads()
        set_threads(1)


def cores() -> int:
    """That this rank shares out its computations to."""
    return _cores


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


_cores = 1
_streams: list[mx.Stream] = []
