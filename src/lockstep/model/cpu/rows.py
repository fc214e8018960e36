"""Products with as many rows as the BLAS has kernels for."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.blas import kernels

_KERNEL_ROWS = {"Haswell": 4, "Zen": 4}
"""Rows that OpenBLAS' kernels multiply at a time: fewer take them longer (7 rows 1.5 times as long as 8)."""


def cpu_rows(model: nn.Module) -> None:
    """Let linear layers, and embeddings that are the head, multiply more rows where that takes less time."""
    multiple = _KERNEL_ROWS.get(kernels())
    if multiple is None:
        return
    kinds: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        if kind is nn.Linear:
            kinds.setdefault(kind, _filling(kind, "__call__", multiple))
        if kind is nn.Embedding:
            kinds.setdefault(kind, _filling(kind, "as_linear", multiple))
        module.__class__ = kinds.get(kind, kind)


def _filling(kind: type, name: str, multiple: int) -> type:
    """A subclass of `kind` whose method `name` is given a multiple of rows."""
    method = getattr(kind, name)
    return type(kind.__name__, (kind,), {name: lambda self, x: filled(method, self, x, multiple)})


def filled(
    multiply: Callable[[nn.Module, mx.array], mx.array], module: nn.Module, x: mx.array, multiple: int
) -> mx.array:
    """`multiply(module, x)`, where rows of `x` [..., width] are repeated to make their number a multiple.

    One row stays alone, which is no slower, and so do inputs that have rows along several axes.
    """
    rows = math.prod(x.shape[:-1])
    missing = -rows % multiple
    axis = next((axis for axis, count in enumerate(x.shape[:-1]) if count == rows), None)
    if axis is None or not 0 < missing <= rows:
        return multiply(module, x)
    at = [slice(None)] * x.ndim
    at[axis] = slice(missing)
    whole = mx.concatenate([x, x[tuple(at)]], axis)
    at[axis] = slice(rows)
    return multiply(module, whole)[tuple(at)]
