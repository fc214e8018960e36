"""Where ranks meet: sums of partial outputs, norms over what is cut, and the vocabulary.

A module keeps its name, its parameters and its class's code; it gets a subclass of that class which
communicates before or after. So every `isinstance` and every path into the model stays true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.tensor.shares import Range


def reduce_together(modules: Sequence[nn.Module], group: mx.distributed.Group) -> None:
    """Sum the outputs of modules that the model's code adds up with one all_reduce for all of them.

    Each is called once per forward pass. All but the last to be called return zero, and the last returns
    the sum of all; so their sum is right, and nothing but a sum may see them.
    """
    partial: list[mx.array] = []

    def call(base: Callable[..., mx.array], *args: Any, **kwargs: Any) -> mx.array:
        partial.append(base(*args, **kwargs))
        if len(partial) < len(modules):
            return mx.zeros((), partial[0].dtype)
        total = sum(partial[1:], start=partial[0])
        partial.clear()
        return mx.distributed.all_sum(total, group=group)

    for module in modules:
        _override(module, "Reduced", __call__=call)


def span_norm(module: nn.RMSNorm, size: int, group: mx.distributed.Group) -> None:
    """Normalise over `size` entries of which each rank has some: one all_reduce of a number per token."""

    def call(base: object, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        squares = mx.distributed.all_sum(mx.sum(wide * wide, axis=-1, keepdims=True), group=group)
        normal: mx.array = wide * mx.rsqrt(squares / size + module.eps)
        return normal.astype(x.dtype) * module.weight  # type: ignore[no-any-return]

    _override(module, "Spanning", __call__=call)


def split_embedding(module: nn.Module, ranges: Sequence[Range], group: mx.distributed.Group) -> None:
    """Look up on the rank that has the row, and sum; as a head, gather everybody's logits."""
    first, last = ranges[group.rank()]

    def call(base: Callable[..., mx.array], ids: mx.array) -> mx.array:
        mine = (ids >= first) & (ids < last)
        rows = base(mx.where(mine, ids - first, 0))
        return mx.distributed.all_sum(mx.where(mine[..., None], rows, 0), group=group)

    def as_linear(base: Callable[..., mx.array], x: mx.array) -> mx.array:
        return gather(base(x), ranges, group)

    _override(module, "Split", __call__=call, as_linear=as_linear)


def split_head(module: nn.Module, ranges: Sequence[Range], group: mx.distributed.Group) -> None:
    """Compute this rank's slice of the logits and gather everybody's."""

    def call(base: Callable[..., mx.array], x: mx.array) -> mx.array:
        return gather(base(x), ranges, group)

    _override(module, "Split", __call__=call)


def gather(part: mx.array, ranges: Sequence[Range], group: mx.distributed.Group) -> mx.array:
    """Everybody's slices of the last axis, whose sizes may differ, next to each other."""
    sizes = [last - first for first, last in ranges]
    widest = max(sizes)
    if part.shape[-1] < widest:
        part = mx.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, widest - part.shape[-1])])
    parts = mx.distributed.all_gather(part[None], group=group)
    return mx.concatenate([parts[rank, ..., :size] for rank, size in enumerate(sizes)], axis=-1)


def _override(module: nn.Module, prefix: str, **methods: Callable[..., mx.array]) -> None:
    """Give `module` a subclass of its class; each method gets the base class's, bound, as first argument."""
    base = type(module)

    def bound(name: str, method: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
            return method(getattr(super(kind, self), name), *args, **kwargs)

        return replaced

    kind: type = type(prefix + base.__name__, (base,), {name: bound(name, m) for name, m in methods.items()})
    module.__class__ = kind
