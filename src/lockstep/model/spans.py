"""The best way to cut a row of layers into contiguous spans, one for each stage of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from lockstep.errors import UsageError

Span = tuple[int, int]
"""First layer and last layer + 1."""


def best_spans(
    layers: int,
    counts: Sequence[int | None],
    cost: Callable[[int, int, int], float],
    cuts: Collection[int] | None = None,
) -> tuple[Span, ...]:
    """The contiguous spans, indexed by rank, whose largest cost is smallest; exact, by dynamic programming.

    Of several such cuts, the one with the smallest sum of squares: the most even one. `counts` fix a rank's
    number of layers, where not None. `cuts` are the layers that a span may begin with besides layer 0; None
    allows all. Raises UsageError when there is no such cut.
    """
    starts = range(layers) if cuts is None else {0, *cuts}
    table: dict[tuple[int, int, int], float] = {}
    for rank, count in enumerate(counts):
        # A rank leaves at least one layer to each stage before and after it.
        for first in range(len(counts) - 1 - rank, layers - rank):
            if first not in starts:
                continue
            for end in range(first + 1, layers - rank + 1):
                if count is None or count == end - first:
                    table[rank, first, end] = cost(rank, first, end)
    found = _cheapest(layers, len(counts), table, max)
    if found is None:
        places = ", ".join(str(start) for start in sorted(starts) if start) or "nowhere"
        raise UsageError(
            f"this model of {layers} layers cannot be cut like this over {len(counts)} ranks, only before "
            f"layers: {places}"
        )
    even = {key: value * value for key, value in table.items() if value <= found[0]}
    found = _cheapest(layers, len(counts), even, lambda a, b: a + b)
    assert found is not None, "the cut found first is among the even ones"
    return found[1]


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
