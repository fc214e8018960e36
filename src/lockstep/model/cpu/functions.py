"""Attention and SwiGLU for CPUs, where mlx's `exp` takes 2.5 times as long as its `power` of e.

Attention also lets the query heads that share keys be rows of one matrix, divides by the sum of the weights
last, where there are fewer numbers to divide, and takes a few queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.cpu.spread import spread

_LOWEST = -1e30
"""Added to a score, it leaves nothing of its weight; if all scores of a row are masked, they stay finite."""

_QUERIES = 32
"""That attend at a time: so few that their scores stay in the processor's cache, and that of a prompt's own
tokens only those are multiplied that they may see."""


def cpu_functions(model: nn.Module) -> None:
    """Let the model's modules call these functions in place of mlx-lm's. Modules that call others stay."""
    from mlx_lm.models import activations, base

    replacements: dict[str, tuple[Any, Callable[..., mx.array]]] = {
        "swiglu": (activations.swiglu, swiglu),
        "scaled_dot_product_attention": (base.scaled_dot_product_attention, Attention()),
    }
    kinds: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _calling(kind, replacements)
        module.__class__ = kinds[kind]


def _calling(kind: type, replacements: dict[str, tuple[Any, Callable[..., mx.array]]]) -> type:
    """`kind`, or a subclass whose `__call__` finds the replacements where it has imported the originals."""
    call = kind.__call__
    if not isinstance(call, FunctionType):
        return kind
    own = {
        name: ours
        for name, (theirs, ours) in replacements.items()
        if name in call.__code__.co_names and call.__globals__.get(name) is theirs
    }
    if not own:
        return kind
    seen = FunctionType(
        call.__code__, call.__globals__ | own, call.__name__, call.__defaults__, call.__closure__
    )
    seen.__kwdefaults__ = call.__kwdefaults__
    return type(kind.__name__, (kind,), {"__call__": seen})


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """`silu(gate) * x`."""
    shape = gate.shape
    return gate * x / (spread(1.0, shape) + mx.power(spread(1 / math.e, shape), gate))


class Attention:
    """Scaled dot-product attention.

    It remembers what it made of the last mask: all layers of a pass are given the same one.
    """

    def __init__(self) -> None:
        self._last: tuple[mx.array, mx.array] | None = None

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """That of float32 `queries` [rows, heads, length, width]; returns the same shape.

        `keys` and `values` are [rows, KV heads, tokens, width]; `mask` is "causal", True where a key may be
        seen, or added to the scores. Whatever else mlx-lm's function of that name takes is left to it.
        """
        known = mask is None or isinstance(mask, str) or mask.ndim in (2, 4)
        if sinks is not None or hasattr(cache, "bits") or queries.dtype != mx.float32 or not known:
            from mlx_lm.models.base import scaled_dot_product_attention

            return scaled_dot_product_attention(  # type: ignore[no-any-return]
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )
        length, tokens = queries.shape[2], keys.shape[2]
        bias = self._bias(mask)
        parts = []
        for first in range(0, length, _QUERIES):
            last = min(first + _QUERIES, length)
            part = queries[:, :, first:last]
            if isinstance(mask, str) and length > 1:
                seen = tokens - (length - last)
                causal = _added(mx.arange(seen - (last - first), seen)[:, None] >= mx.arange(seen))
                parts.append(_attended(part, keys[:, :, :seen], values[:, :, :seen], scale, causal))
            else:
                own = bias if bias is None or bias.shape[-2] == 1 else bias[..., first:last, :]
                parts.append(_attended(part, keys, values, scale, own))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)

    def _bias(self, mask: mx.array | str | None) -> mx.array | None:
        if not isinstance(mask, mx.array):
            self._last = None
        elif self._last is None or self._last[0] is not mask:
            self._last = mask, _added(mask)
        return self._last and self._last[1]


def _added(mask: mx.array) -> mx.array:
    """What `mask` adds to scores."""
    return mx.where(mask, 0.0, _LOWEST) if mask.dtype == mx.bool_ else mx.maximum(mask, _LOWEST)


def _attended(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, bias: mx.array | None
) -> mx.array:
    rows, heads, length, width = queries.shape
    kv_heads = keys.shape[1]
    grouped, across = queries.reshape(rows, kv_heads, -1, width), keys.swapaxes(-1, -2)
    if bias is None:
        scores = (grouped * spread(scale, grouped.shape)) @ across
    else:
        scores = mx.addmm(_grouped(bias, heads // kv_heads, length), grouped, across, alpha=scale)
    weights = mx.power(spread(math.e, scores.shape), scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return mixed.reshape(rows, heads, length, -1)


def _grouped(bias: mx.array, group: int, length: int) -> mx.array:
    """`bias`, of all heads or each, for scores whose rows are those of `group` query heads."""
    if bias.ndim == 2:
        bias = bias[None, None]
    rows, heads, _, tokens = bias.shape
    if group == 1 or (heads == length == 1):
        return bias
    each = mx.broadcast_to(bias, (rows, group if heads == 1 else heads, length, tokens))
    return each.reshape(rows, -1, group * length, tokens)
