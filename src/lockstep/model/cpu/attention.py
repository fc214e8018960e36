"""Attention for CPUs: scores in blocks that stay in the processor's cache, and a softmax of its own.

The query heads that share keys are rows of one matrix, and the sum of the weights divides last, where there
are fewer numbers to divide.
"""

from __future__ import annotations

import math
import weakref
from functools import cache
from typing import Any

import mlx.core as mx

from lockstep.model.cpu.cores import on_cores
from lockstep.model.cpu.softmax import softmax_of_powers
from lockstep.model.cpu.spread import spread

_LOWEST = -1e30
"""Added to a score, it leaves nothing of its weight; if all scores of a row are masked, they stay finite."""

_BLOCK_SCORES = 3 << 16
"""That are computed at a time, if there are so many: 768 KB, which stay in the processor's cache."""

_BLOCK_QUERIES = 64
"""In a block at most: of a prompt's own tokens those scores of a block are in vain that are masked."""

_BLOCK_ROWS = 32
"""Of one matrix in a block, at least, if there are so many: a product of fewer takes longer for each."""

_FEW_SCORES = 2048
"""Of one row, for which mlx takes less time: fewer operations, each of them slower."""

_FEW_ROWS, _MANY_SCORES = 16, 1 << 16
"""So few rows OpenBLAS multiplies by so many keys faster if the keys come first."""

_WORTH_A_CORE = 1 << 17
"""Scores that repay handing them to another core."""


class Attention:
    """Scaled dot-product attention.

    It remembers what it made of a mask until the mask is gone: all layers of a pass are given the same ones.
    """

    def __init__(self) -> None:
        self._biases: dict[int, mx.array] = {}  # By the id of their mask.

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
        if _is_left_to_mlx(queries, keys, cache, mask, sinks):
            from mlx_lm.models.base import scaled_dot_product_attention

            return scaled_dot_product_attention(  # type: ignore[no-any-return]
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )
        return _attended_on_cores(queries, keys, values, scale, self._bias(mask), isinstance(mask, str))

    def _bias(self, mask: mx.array | str | None) -> mx.array | None:
        if not isinstance(mask, mx.array):
            return None
        key = id(mask)
        if key not in self._biases:
            self._biases[key] = _added(mask)
            weakref.finalize(mask, self._biases.pop, key)
        return self._biases[key]


def _is_left_to_mlx(
    queries: mx.array, keys: Any, cache: Any, mask: mx.array | str | None, sinks: mx.array | None
) -> bool:
    if sinks is not None or hasattr(cache, "bits") or queries.dtype != mx.float32:
        return True
    if isinstance(mask, mx.array) and mask.ndim not in (2, 4):
        return True
    rows, heads, length, _ = queries.shape
    return rows == length == 1 and heads * keys.shape[2] <= _FEW_SCORES


def _attended_on_cores(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, bias: mx.array | None, causal: bool
) -> mx.array:
    """The attention of all, each core that this is worth taking some of the KV heads."""
    (_, heads, _, _), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    group, scores = heads // kv_heads, math.prod(queries.shape[:3]) * tokens

    def attended(first: int, last: int) -> mx.array:
        asking, own = slice(first * group, last * group), slice(first, last)
        part = None if bias is None else _part(bias, asking, slice(None))
        return _attended_in_blocks(queries[:, asking], keys[:, own], values[:, own], scale, part, causal)

    return on_cores(attended, kv_heads, scores // _WORTH_A_CORE, 1)


def _block(queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[int, int]:
    """How many queries, and how many KV heads, make one block."""
    (rows, heads, length, _), (_, kv_heads, tokens, _) = queries, keys
    group = heads // kv_heads
    of_query = rows * group * tokens
    most = min(_BLOCK_SCORES // of_query, _BLOCK_QUERIES)
    block_length = min(length, max(most, -(-_BLOCK_ROWS // group)))
    return block_length, min(kv_heads, max(_BLOCK_SCORES // (of_query * block_length), 1))


def _attended_in_blocks(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    bias: mx.array | None,
    causal: bool,
) -> mx.array:
    """The attention of all on one core, a block of queries and KV heads at a time."""
    (_, heads, length, _), (_, kv_heads, tokens, _) = queries.shape, keys.shape
    (block_length, block_heads), group = _block(queries.shape, keys.shape), heads // kv_heads
    if (block_length, block_heads) == (length, kv_heads):
        return _attended(queries, keys, values, scale, bias, causal)
    mixed = []
    for first in range(0, length, block_length):
        last = min(first + block_length, length)
        seen = tokens - length + last if causal else tokens
        for head in range(0, kv_heads, block_heads):
            own = slice(head, head + block_heads)
            asking = slice(head * group, (head + block_heads) * group)
            part = None if bias is None else _part(bias, asking, slice(first, last))
            asked = keys[:, own, :seen], values[:, own, :seen]
            mixed.append(_attended(queries[:, asking, first:last], *asked, scale, part, causal))
    abreast = -(-kv_heads // block_heads)
    lengths = [mx.concatenate(mixed[i : i + abreast], axis=1) for i in range(0, len(mixed), abreast)]
    return mx.concatenate(lengths, axis=2)


def _attended(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, bias: mx.array | None, causal: bool
) -> mx.array:
    """The attention of one block. If `causal`, the last keys are those of the queries."""
    rows, heads, length, width = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    grouped = queries.reshape(rows, kv_heads, group * length, width)
    if bias is not None:
        bias = _grouped(bias, group, length)
    scores = _scores(grouped, keys, scale / math.log(2), bias)
    if causal and length > 1:
        of_heads = scores.reshape(rows, kv_heads, group, length, -1)
        of_heads = of_heads.at[..., -length:].add(_later()[:length, :length])
        scores = of_heads.reshape(scores.shape)
    weights, sums = softmax_of_powers(scores)
    return (weights @ values / sums).reshape(rows, heads, length, -1)


def _scores(queries: mx.array, keys: mx.array, scale: float, bias: mx.array | None) -> mx.array:
    (rows, kv_heads, each, _), tokens = queries.shape, keys.shape[2]
    if each <= _FEW_ROWS and rows * kv_heads * each * tokens >= _MANY_SCORES:
        scaled = queries * spread(scale, queries.shape)
        scores = mx.contiguous((keys @ scaled.swapaxes(-1, -2)).swapaxes(-1, -2))
        return scores if bias is None else scores + bias
    across = keys.swapaxes(-1, -2)
    if bias is None:
        return (queries * spread(scale, queries.shape)) @ across
    return mx.addmm(bias, queries, across, alpha=scale)


def _added(mask: mx.array) -> mx.array:
    """What `mask` adds to exponents of two: [rows or 1, heads or 1, length or 1, tokens]."""
    is_seen = mask.dtype == mx.bool_
    bias = mx.where(mask, 0.0, _LOWEST) if is_seen else mx.maximum(mask / math.log(2), _LOWEST)
    return bias if bias.ndim == 4 else bias[None, None]


def _part(bias: mx.array, heads: slice, queries: slice) -> mx.array:
    whole = slice(None)
    return bias[:, heads if bias.shape[1] > 1 else whole, queries if bias.shape[2] > 1 else whole]


def _grouped(bias: mx.array, group: int, length: int) -> mx.array:
    """`bias`, of all heads or each, for scores whose rows are those of `group` query heads."""
    rows, heads, _, tokens = bias.shape
    if group == 1 or (heads == length == 1):
        return bias
    each = mx.broadcast_to(bias, (rows, group if heads == 1 else heads, length, tokens))
    return each.reshape(rows, -1, group * length, tokens)


@cache
def _later() -> mx.array:
    """What hides each of a block's tokens from those before it."""
    places = mx.arange(_BLOCK_QUERIES)
    return _added(places[:, None] >= places)[0, 0]
