"""The best way to cut a row of layers into contiguous spans, one for each stage of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from lockstep.errors import UsageError

Span = tuple[int, int]
"""First layer and last layer + 1."""

Fixed = Span | int | None
"""What was decided by hand for a rank: this span, this many layers, or nothing."""


def best_spans(
    layers: int,
    wanted: Sequence[Fixed],
    cost: Callable[[int, int, int], float],
    cuts: Collection[int] | None = None,
) -> tuple[Span, ...]:
    """The contiguous spans, indexed by rank, whose largest cost is smallest; exact, by dynamic programming.

    Of several such cuts, the one with the smallest sum of squares: the most even one. `cuts` are the layers
    that a span may begin with besides layer 0; None allows all. Raises UsageError when there is no such cut.
    """
    starts = range(layers) if cuts is None else {0, *cuts}
    table: dict[tuple[int, int, int], float] = {}
    for rank, want in enumerate(wanted):
        # A rank leaves at least one layer to each stage before and after it.
        for first in range(len(wanted) - 1 - rank, layers - rank):
            if first not in starts:
                continue
            for end in range(first + 1, layers - rank + 1):
                if want is None or want == (first, end) or want == end - first:
                    table[rank, first, end] = cost(rank, first, end)
    found = _cheapest(layers, len(wanted), table, max)
    if found is None:
        raise UsageError(_impossible(layers, len(wanted), cuts))
    even = {key: value * value for key, value in table.items() if value <= found[0]}
    found = _cheapest(layers, len(wanted), even, lambda a, b: a + b)
    assert found is not None, "the cut found first is among the even ones"
    return found[1]


def _impossible(layers: int, n: int, cuts: Collection[int] | None) -> str:
    if cuts is None:
        return (
            f"the hostfile's layers do not cover layers 0-{layers - 1} once each, from the last rank "
            "(first layers) to rank 0 (last layers)"
        )
    places = ", ".join(map(str, sorted(cuts))) or "nowhere"
    return (
        f"this model of {layers} layers cannot be cut like this over {n} ranks, only before layers: {places}"
    )


def _cheapest(
    layers: int,
    n: int,
    table: dict[tuple[int, int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, tuple[Span, ...]] | None:
    # best[end]: the cheapest way for the stages so far to compute layers 0..end-1, spans by rank.
    best: dict[int, tuple[float, tuple[Span, ...]]] = {0: (0.0, ())}
    for rank in reversed(range(n)):
        longer: dict[int, tuple[float, tuple[Span, ...]]] = {}
        for first, (value, spans) in best.items():
            for end in range(first + 1, layers - rank + 1):
                stage = table.get((rank, first, end))
                if stage is None:
                    continue
                candidate = combine(value, stage)
                if end not in longer or candidate < longer[end][0]:
                    longer[end] = candidate, ((first, end), *spans)
        best = longer
    return best.get(layers)
