"""Products with as many rows as the BLAS has kernels for."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.blas import AVX2, kernels
from lockstep.model.cpu.layers import retype

KERNEL_ROWS = 4
"""Rows that these kernels of OpenBLAS multiply at a time: 7 rows take them 1.5 times as long as 8."""


class FilledLinear(nn.Linear):  # type: ignore[misc]
    """A linear layer that multiplies more rows where that takes less time."""

    def __call__(self, x: mx.array) -> mx.array:
        return filled(super().__call__, x)


class FilledEmbedding(nn.Embedding):  # type: ignore[misc]
    """An embedding that does so where it is the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        return filled(super().as_linear, x)


def cpu_rows(model: nn.Module) -> None:
    """Let linear layers, and embeddings that are the head, fill up their rows."""
    if kernels() in AVX2:
        retype(model, {nn.Linear: FilledLinear, nn.Embedding: FilledEmbedding})


def filled(multiply: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """`multiply(x)`, where rows of `x` [..., width] are repeated to make their number a multiple.

    One row stays alone, which is no slower, and so do inputs that have rows along several axes.
    """
    rows = math.prod(x.shape[:-1])
    missing = -rows % KERNEL_ROWS
    axis = next((axis for axis, count in enumerate(x.shape[:-1]) if count == rows), None)
    if axis is None or not 0 < missing <= rows:
        return multiply(x)
    at = [slice(None)] * x.ndim
    at[axis] = slice(missing)
    whole = mx.concatenate([x, x[tuple(at)]], axis)
    at[axis] = slice(rows)
    return multiply(whole)[tuple(at)]
