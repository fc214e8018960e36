"""Which rank computes which layers: numbers in, everybody's share out. No mlx, no files, no clock.

Stages run from rank N-1 (embedding, first layers) down to rank 0 (last layers, norm, head). A plan is made
on rank 0 and sent to all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from lockstep.errors import UsageError
from lockstep.model.costs import ModelCosts
from lockstep.model.spans import Span, best_spans

Strategy = Literal["auto", "equal", "memory"]
DEFAULT_CONTEXT = 8192
"""Tokens of cache to plan for when nobody says how many."""

WORKING_BYTES = 200_000_000
"""Activations, buffers and the runtime itself, beside weights and caches."""


@dataclass(frozen=True)
class RankResources:
    """What one rank has. `memory_bytes` is free for weights and caches."""

    memory_bytes: int
    host: str = ""
    speed: float = 1.0
    """Bytes of weights per second; only the ratios between ranks matter."""
    costs: ModelCosts | None = None
    """The model's in this rank's own precision, where that is not everybody's."""


@dataclass(frozen=True)
class Share:
    """What one rank holds when it is loaded and its caches are full."""

    rank: int
    host: str
    span: Span
    weight_bytes: int
    kv_bytes: int
    loading_bytes: int
    """The largest tensor: held twice for a moment while loading, when there is no cache yet."""
    memory_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + max(self.kv_bytes, self.loading_bytes) + WORKING_BYTES

    @property
    def free_bytes(self) -> int:
        """What is left of the rank's memory; negative by as much as it does not fit."""
        return self.memory_bytes - self.needed_bytes


@dataclass(frozen=True)
class Plan:
    """Every rank's share, indexed by rank."""

    shares: tuple[Share, ...]
    strategy: str
    context: int

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(share.span for share in self.shares)

    @property
    def fits(self) -> bool:
        return all(share.free_bytes >= 0 for share in self.shares)


def parse_split(text: str) -> tuple[Strategy, tuple[int, ...] | None]:
    """`--split`: the name of a strategy, or numbers of layers in rank order (rank 0 first)."""
    for strategy in get_args(Strategy):
        if text == strategy:
            return strategy, None
    try:
        return "auto", tuple(int(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(get_args(Strategy))
        raise UsageError(f"--split {text}: give numbers of layers like 10,9,9, or one of {names}") from None


def propose(
    costs: ModelCosts,
    ranks: Sequence[RankResources],
    strategy: Strategy = "auto",
    split: Sequence[int] | None = None,
    context: int = DEFAULT_CONTEXT,
    cuts: Collection[int] | None = None,
) -> Plan:
    """Cut the model over `ranks`; `context` is the number of tokens that all caches hold together.

    `equal` minimises the time of the slowest stage, `memory` the fullest rank, `auto` is `equal` where that
    fits and `memory` elsewhere. `split` fixes each rank's number of layers, in rank order. `cuts` are the
    layers that a stage may begin with, where not all may. The plan may not fit: see `shortfall.check_fits`.
    Raises UsageError for what cannot be done as asked.
    """
    _check_counts(costs.layers, len(ranks), split)
    meter = Meter(costs, ranks, context)
    if split is not None:
        return meter.plan(best_spans(costs.layers, split, meter.seconds, cuts), "manual")
    free = [None] * len(ranks)
    if strategy != "memory":
        proposed = meter.plan(best_spans(costs.layers, free, meter.seconds, cuts), "equal")
        if strategy == "equal" or proposed.fits:
            return proposed
    return meter.plan(best_spans(costs.layers, free, meter.fill, cuts), "memory")


class Meter:
    """What a span would cost a rank, by prefix sums."""

    def __init__(self, costs: ModelCosts, ranks: Sequence[RankResources], context: int) -> None:
        self.ranks = ranks
        self.context = context
        self._own = [rank.costs or costs for rank in ranks]
        self._weights = [_prefix_sums(own.layer_bytes) for own in self._own]
        self._reads = [_prefix_sums(own.read_bytes) for own in self._own]
        self._kv = [
            _prefix_sums([own.kv_bytes(layer, context) for layer in range(costs.layers)]) for own in self._own
        ]

    def share(self, rank: int, first: int, end: int) -> Share:
        own, resources = self._own[rank], self.ranks[rank]
        weights = self._weights[rank][end] - self._weights[rank][first]
        if rank == 0:
            weights += own.head_bytes
        if rank == len(self.ranks) - 1 and not (rank == 0 and own.tied):
            weights += own.embedding_bytes
        return Share(
            rank=rank,
            host=resources.host,
            span=(first, end),
            weight_bytes=weights,
            kv_bytes=self._kv[rank][end] - self._kv[rank][first],
            loading_bytes=own.largest_tensor_bytes,
            memory_bytes=resources.memory_bytes,
        )

    def seconds(self, rank: int, first: int, end: int) -> float:
        """Time of one token, up to a constant. Looking up a row of the embedding reads next to nothing."""
        read = self._reads[rank][end] - self._reads[rank][first]
        return (read + (self._own[rank].head_bytes if rank == 0 else 0)) / self.ranks[rank].speed

    def fill(self, rank: int, first: int, end: int) -> float:
        """Needed memory as a fraction of the rank's own."""
        return self.share(rank, first, end).needed_bytes / max(self.ranks[rank].memory_bytes, 1)

    def plan(self, spans: Sequence[Span], strategy: str) -> Plan:
        shares = tuple(self.share(rank, *span) for rank, span in enumerate(spans))
        return Plan(shares, strategy, self.context)


def _prefix_sums(values: Sequence[int]) -> list[int]:
    return list(accumulate(values, initial=0))


def _check_counts(layers: int, n: int, split: Sequence[int] | None) -> None:
    """Raises UsageError when `layers` cannot be given to `n` ranks, or not in the numbers of `split`."""
    if not 1 <= n <= layers:
        raise UsageError(
            f"a model of {layers} layers cannot be cut into {n} stages: use between 1 and {layers} ranks"
        )
    if split is None:
        return
    name = f"the split {','.join(map(str, split))}"
    if len(split) != n:
        raise UsageError(f"{name} is for {len(split)} ranks, but there are {n}")
    if min(split) < 1:
        raise UsageError(f"{name}: every rank needs at least one layer; of {layers} layers over {n} ranks")
    if sum(split) != layers:
        raise UsageError(f"{name} adds up to {sum(split)} layers, but the model has {layers}")
