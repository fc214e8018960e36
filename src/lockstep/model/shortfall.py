"""What is said when a model does not fit the ranks, in numbers, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from lockstep.errors import DoesNotFit
from lockstep.model.costs import ModelCosts
from lockstep.model.partition import WORKING_BYTES, Meter, Plan, RankResources, propose


def check_fits(
    costs: ModelCosts,
    ranks: Sequence[RankResources],
    proposed: Plan,
    cuts: Collection[int] | None = None,
) -> None:
    """Raises DoesNotFit, saying by how much `proposed` does not fit and what would help."""
    if not proposed.fits:
        raise DoesNotFit(shortfall(costs, ranks, proposed, cuts))


def shortfall(
    costs: ModelCosts,
    ranks: Sequence[RankResources],
    proposed: Plan,
    cuts: Collection[int] | None = None,
) -> str:
    """Why `proposed` does not fit, in numbers, and what would make it fit."""
    worst = min(proposed.shares, key=lambda share: share.free_bytes)
    name = f"rank {worst.rank}" + (f" ({worst.host})" if worst.host else "")
    first, end = worst.span
    problem = (
        f"the model does not fit: {name} needs {gigabytes(worst.needed_bytes)} for layers {first}-{end - 1} "
        f"and {proposed.context} tokens of context, {gigabytes(-worst.free_bytes)} more than the "
        f"{gigabytes(worst.memory_bytes)} that are free"
    )
    remedies = _remedies(costs, ranks, proposed, cuts)
    return f"{problem}. What would fit: {'; or '.join([*remedies, 'a smaller or more quantized model'])}"


def gigabytes(count: int) -> str:
    """Bytes for people; decimal, as memory and disks are sold."""
    return f"{count / 1e9:.2f} GB"


def _remedies(
    costs: ModelCosts, ranks: Sequence[RankResources], proposed: Plan, cuts: Collection[int] | None
) -> list[str]:
    remedies = []

    def fits_with(context: int) -> bool:
        meter = Meter(costs, ranks, context)
        return meter.plan(proposed.spans, proposed.strategy).fits

    if fits_with(0):
        remedies.append(f"{_largest(fits_with, proposed.context)} tokens of context (--context)")
    if proposed.strategy != "memory" and propose(costs, ranks, "memory", None, proposed.context, cuts).fits:
        remedies.append("--split memory")
    if len(ranks) < costs.layers:
        extra = smallest_extra_rank(costs, ranks, proposed.context)
        if extra is not None:
            remedies.append(f"one more machine with {gigabytes(extra)} free")
    return remedies


def smallest_extra_rank(costs: ModelCosts, ranks: Sequence[RankResources], context: int) -> int | None:
    """Memory in bytes that one more rank, put last, must have for `memory` to fit; None if none helps."""
    step = 10_000_000

    def fails_with(steps: int) -> bool:
        return not _fills(costs, [*ranks, RankResources(steps * step)], context)

    everything = sum(costs.kv_bytes(layer, context) for layer in range(costs.layers)) + costs.total_bytes
    most = (everything + costs.largest_tensor_bytes + WORKING_BYTES) // step + 1
    if fails_with(most):
        return None
    return (_largest(fails_with, most) + 1) * step


def _fills(costs: ModelCosts, ranks: Sequence[RankResources], context: int) -> bool:
    """Whether any contiguous cut fits: from the first stage on, each takes as many layers as it can."""
    meter = Meter(costs, ranks, context)
    first = 0
    for rank in reversed(range(len(ranks))):
        ends = [costs.layers] if rank == 0 else range(costs.layers - rank, first, -1)
        end = next((end for end in ends if meter.share(rank, first, end).free_bytes >= 0), None)
        if end is None:
            return False
        first = end
    return True


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number below `limit` for which `holds`, which is true at 0 and turns false once."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
