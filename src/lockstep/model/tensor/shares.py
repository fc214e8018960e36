"""Who gets which heads, columns and vocabulary rows: numbers in, everybody's share out. No mlx.

Shares are uneven where the ranks' weights are or where the units do not divide, and always contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from lockstep.errors import UsageError

Range = tuple[int, int]
"""First and last + 1."""


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank: key/value heads, and query heads counted over the whole block."""

    kv: Range
    query: Range


def apportion(units: int, weights: Sequence[float]) -> tuple[Range, ...]:
    """Cut `units` into contiguous ranges proportional to `weights`, each within one unit of its due.

    Nobody is left with nothing: where its due is less than one unit, a rank gets one, taken from the ranks
    that are furthest above theirs. Raises UsageError when there are fewer units than ranks.
    """
    ranks = len(weights)
    if units < ranks:
        raise UsageError(f"{units} units cannot be cut for {ranks} ranks: use at most {units} ranks")
    if min(weights) <= 0:
        raise UsageError(f"weights {tuple(weights)}: every rank needs a weight above 0")
    due = [units * weight / sum(weights) for weight in weights]
    sizes = [max(1, int(share)) for share in due]
    while sum(sizes) < units:
        rank = max(range(ranks), key=lambda r: (due[r] - sizes[r], -r))
        sizes[rank] += 1
    while sum(sizes) > units:
        rank = max((r for r in range(ranks) if sizes[r] > 1), key=lambda r: (sizes[r] - due[r], r))
        sizes[rank] -= 1
    ends = [sum(sizes[: rank + 1]) for rank in range(ranks)]
    return tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))


def columns(count: int, weights: Sequence[float], group: int = 1) -> tuple[Range, ...]:
    """Cut `count` columns in multiples of the quantization `group`.

    Where there are plenty, the cuts fall on multiples of a cache line, for speed. Raises UsageError when
    a group would have to be split.
    """
    if count % group:
        raise UsageError(f"{count} columns are no multiple of the quantization group of {group}")
    if count // group < len(weights):
        raise UsageError(
            f"{count} columns in quantization groups of {group} are {count // group} pieces, too few for "
            f"{len(weights)} ranks: use at most {count // group} tensor ranks, or --parallel pipeline"
        )
    unit = group
    while unit < 32 and count % (2 * unit) == 0 and count // (2 * unit) >= 32 * len(weights):
        unit *= 2
    return tuple((first * unit, last * unit) for first, last in apportion(count // unit, weights))


def heads(
    kv_heads: int, per_kv: int, weights: Sequence[float], width: int = 1, group: int = 1
) -> tuple[HeadShare, ...]:
    """Cut attention by key/value heads, each with its `per_kv` query heads.

    `width` is a head's number of columns in the output projection, whose quantization `group` no cut may
    split. With more ranks than key/value heads, ranks share one: each has a copy of it and some of its
    query heads. Raises UsageError with the numbers when neither is possible.
    """
    ranks = len(weights)
    if ranks > kv_heads:
        return _shared_heads(kv_heads, per_kv, weights, width, group)
    unit = _unit(per_kv * width, group)
    if kv_heads % unit or kv_heads // unit < ranks:
        raise UsageError(
            f"{kv_heads} key/value heads of {per_kv * width} columns cannot be cut for {ranks} ranks without "
            f"splitting a quantization group of {group}: "
            f"use at most {max(1, kv_heads // unit)} tensor ranks, or --parallel pipeline"
        )
    ranges = [(first * unit, last * unit) for first, last in apportion(kv_heads // unit, weights)]
    return tuple(HeadShare(kv=(a, b), query=(a * per_kv, b * per_kv)) for a, b in ranges)


def _shared_heads(
    kv_heads: int, per_kv: int, weights: Sequence[float], width: int, group: int
) -> tuple[HeadShare, ...]:
    ranks = len(weights)
    unit = _unit(width, group)
    sharers = ranks // kv_heads
    if ranks % kv_heads or per_kv % unit or per_kv // unit < sharers:
        raise UsageError(
            f"{kv_heads} key/value heads with {per_kv} query heads each cannot be cut for {ranks} ranks: "
            f"use at most {kv_heads} tensor ranks, or --parallel pipeline"
        )
    shares = []
    for head in range(kv_heads):
        for first, last in apportion(per_kv // unit, weights[head * sharers : (head + 1) * sharers]):
            query = (head * per_kv + first * unit, head * per_kv + last * unit)
            shares.append(HeadShare(kv=(head, head + 1), query=query))
    return tuple(shares)


def _unit(width: int, group: int) -> int:
    """The fewest neighbours, each `width` columns wide, that end where a quantization group ends."""
    return group // gcd(width, group)


def scaled(range_: Range, factor: int) -> Range:
    """The rows or columns that belong to a range of units that are `factor` wide."""
    return range_[0] * factor, range_[1] * factor
