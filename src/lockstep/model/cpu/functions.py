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

_LOWEST = -1e30
"""Below any score: the highest of a row in which every score is masked, so that its weights stay finite."""

_QUERIES = 32
"""That attend at a time: so few that their scores stay in the processor's cache, and that of a prompt's own
tokens only those are multiplied that they may see."""


def cpu_functions(model: nn.Module) -> None:
    """Let the model's modules call these functions in place of mlx-lm's. Modules that call others stay."""
    from mlx_lm.models import activations, base

    replacements: dict[str, tuple[Any, Callable[..., mx.array]]] = {
        "swiglu": (activations.swiglu, swiglu),
        "scaled_dot_product_attention": (base.scaled_dot_product_attention, attention),
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
    return gate * x / (1.0 + mx.power(1 / math.e, gate))


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention of float32 `queries` [rows, heads, length, width]; returns the same shape.

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
    if length <= _QUERIES:
        return _attended(queries, keys, values, scale, mask)
    parts = []
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        seen = tokens - (length - last) if isinstance(mask, str) else tokens
        own = mask[..., first:last, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
        part = queries[:, :, first:last]
        parts.append(_attended(part, keys[:, :, :seen], values[:, :, :seen], scale, own))
    return mx.concatenate(parts, axis=2)


def _attended(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array:
    rows, heads, length, width = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    grouped = (queries * scale).reshape(rows, kv_heads, -1, width)
    scores = grouped @ keys.swapaxes(-1, -2)
    if mask is not None:
        per_head = scores.reshape(rows, heads, length, tokens)
        scores = _masked(per_head, mask).reshape(scores.shape)
    highest = mx.maximum(scores.max(axis=-1, keepdims=True), _LOWEST)
    weights = mx.power(math.e, scores - highest)
    # The highest score weighs 1, so the sum is less only where every score is masked.
    mixed = (weights @ values) / mx.maximum(weights.sum(axis=-1, keepdims=True), 1.0)
    return mixed.reshape(rows, heads, length, -1)


def _masked(scores: mx.array, mask: mx.array | str) -> mx.array:
    """`mask` applied to scores [rows, heads, length, tokens]; the newest query sees all keys."""
    if isinstance(mask, str):
        length, tokens = scores.shape[-2:]
        mask = mx.arange(tokens - length, tokens)[:, None] >= mx.arange(tokens)
    return mx.where(mask, scores, -math.inf) if mask.dtype == mx.bool_ else scores + mask
