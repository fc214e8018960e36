"""Weights that become float32 only to be multiplied by, one block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

BLOCK = 500_000
"""Numbers of one: it stays in the processor's cache, and in memory that need not be had from the system."""


@contextmanager
def in_one_block() -> Iterator[None]:
    """For graphs that are looked at and never evaluated: they would be large with all blocks."""
    global _one_block
    _one_block = True
    try:
        yield
    finally:
        _one_block = False


def by_blocks(
    product: Callable[..., mx.array], weights: Sequence[mx.array], numbers: int, unit: int = 1
) -> mx.array:
    """`product(*weights)`, made of blocks of `weights`, which are so many `numbers` in float32.

    They are cut along their first axis, which is the last of the product, into whole `unit`s but for the end.
    """
    each = len(weights[0]) if _one_block else max(BLOCK * len(weights[0]) // numbers // unit, 1) * unit
    products: list[mx.array] = []
    for first in range(0, len(weights[0]), each):
        block = [weight[first : first + each] for weight in weights]
        if products:
            # mlx would make all blocks first.
            block[0] = mx.depends(block[0], products[-1])
        products.append(product(*block))
    return mx.concatenate(products, -1)


_one_block = False
