"""Numbers and weights in the shape of what they meet: spreading them is an operation of its own each time."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx


@lru_cache(maxsize=64)
def spread(number: float, shape: tuple[int, ...]) -> mx.array:
    """`number` in that shape, in float32 like all that is computed on CPUs; the same array for all layers."""
    return mx.broadcast_to(mx.array(number), shape)


class SpreadWeight:
    """A layer's weight in the shape of its last input."""

    def __init__(self) -> None:
        self._last: tuple[mx.array, mx.array] | None = None

    def over(self, x: mx.array, weight: mx.array) -> mx.array:
        """`weight` [width] in the shape of `x` [..., width]."""
        if self._last is None or self._last[0] is not weight or self._last[1].shape != x.shape:
            self._last = weight, mx.broadcast_to(weight, x.shape)
        return self._last[1]
