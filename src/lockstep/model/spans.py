"""The best way to cut a row of layers into contiguous spans, one for each stage of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lockstep.errors import UsageError

Span = tuple[int, int]
"""First layer and last layer + 1."""

Fixed = Span | int | None
"""What was decided by hand for a rank: this span, this many layers, or nothing."""


def best_spans(
    layers: int, wanted: Sequence[Fixed], cost: Callable[[int, int, int], float]
) -> tuple[Span, ...]:
    """The contiguous spans, indexed by rank, whose largest cost is smallest; exact, by dynamic programming.

    Of several such cuts, the one with the smallest sum of squares: the most even one.
    """
    table: dict[tuple[int, int, int], float] = {}
    for rank, want in enumerate(wanted):
        # A rank leaves at least one layer to each stage before and after it.
        for first in range(len(wanted) - 1 - rank, layers - rank):
            for end in range(first + 1, layers - rank + 1):
                if want is None or want == (first, end) or want == end - first:
                    table[rank, first, end] = cost(rank, first, end)
    worst, _ = _cheapest(layers, len(wanted), table, max)
    even = {key: value * value for key, value in table.items() if value <= worst}
    _, spans = _cheapest(layers, len(wanted), even, lambda a, b: a + b)
    return spans


def _cheapest(
    layers: int,
    n: int,
    table: dict[tuple[int, int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, tuple[Span, ...]]:
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
    if layers not in best:
        raise UsageError(
            f"the hostfile's layers do not cover layers 0-{layers - 1} once each, from the last rank "
            "(first layers) to rank 0 (last layers)"
        )
    return best[layers]
