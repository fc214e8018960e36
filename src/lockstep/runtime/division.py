"""What each rank computes, from what the ranks say they have; and in what form CPUs hold weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from lockstep.errors import DoesNotFit
from lockstep.model import checkpoint, loader, partition, shortfall
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.costs import ModelCosts
from lockstep.model.parallel import check_pipeline
from lockstep.model.quantized import Held
from lockstep.model.tensor.plan import TensorPlan
from lockstep.runtime.messages import Assignment, Hello
from lockstep.runtime.options import ModelOptions
from lockstep.runtime.rank import World

NEARLY_ALIKE = 1.5
"""Measured speeds that differ by less than this factor are taken as equal."""


@dataclass(frozen=True)
class Division:
    """An assignment, and why it is compact where it is."""

    assignment: Assignment
    too_little: str | None = None


def by_layers(world: World, found: Checkpoint, hellos: Sequence[Hello], options: ModelOptions) -> Division:
    """Whole layers for each rank, a pipeline. Raises UsageError, DoesNotFit where memory is short."""
    check_pipeline(world.backend, world.size)
    strategy, split = partition.parse_split(options.split)
    cuts = loader.stages_may_begin(found) if world.size > 1 else None
    relative = speeds(hellos)

    def fit(own: Sequence[ModelCosts]) -> Assignment:
        resources = [
            partition.RankResources(hello.memory_bytes, hello.host, speed, costs)
            for hello, speed, costs in zip(hellos, relative, own, strict=True)
        ]
        plan = partition.propose(own[0], resources, strategy, split, _context(own[0], options), cuts)
        shortfall.check_fits(own[0], resources, plan, cuts)
        return Assignment("pipeline", list(plan.spans))

    return _held_as_it_fits(fit, found, hellos)


def by_tensors(
    cut: TensorPlan, found: Checkpoint, hellos: Sequence[Hello], options: ModelOptions
) -> Division:
    """A part of every layer for each rank, by a `cut` for `weights_of` them. Raises DoesNotFit where memory
    is short.
    """
    weights = weights_of(hellos, options)
    stored = checkpoint.costs(found, "stored")

    def fit(own: Sequence[ModelCosts]) -> Assignment:
        _check_memory(cut, stored, own, hellos, _context(stored, options))
        return Assignment("tensor", [(0, stored.layers)] * len(hellos), weights)

    return _held_as_it_fits(fit, found, hellos)


def _held_as_it_fits(
    fit: Callable[[Sequence[ModelCosts]], Assignment], found: Checkpoint, hellos: Sequence[Hello]
) -> Division:
    """What `fit` makes of each rank's costs: in float32 on CPUs, compact where it says DoesNotFit to that."""
    try:
        return Division(fit(_costs(found, hellos, "float32")))
    except DoesNotFit as error:
        if not any(hello.float32 for hello in hellos):
            raise
        compact = fit(_costs(found, hellos, "compact"))
        return Division(msgspec.structs.replace(compact, compact=True), str(error))


def _context(costs: ModelCosts, options: ModelOptions) -> int:
    return min(options.context or partition.DEFAULT_CONTEXT, costs.max_context)


def _costs(found: Checkpoint, hellos: Sequence[Hello], on_cpu: Held) -> list[ModelCosts]:
    """What the model costs each rank, in that form on CPUs and as stored on GPUs."""
    forms: list[Held] = [on_cpu if hello.float32 else "stored" for hello in hellos]
    by_form = {held: checkpoint.costs(found, held) for held in set(forms)}
    return [by_form[held] for held in forms]


def _check_memory(
    cut: TensorPlan, stored: ModelCosts, own: Sequence[ModelCosts], hellos: Sequence[Hello], context: int
) -> None:
    """Raises DoesNotFit when a rank has less memory free than its part of every layer and its cache takes."""
    for hello, costs in zip(hellos, own, strict=True):
        cache = sum(costs.kv_bytes(layer, context) for layer in range(costs.layers))
        part = (costs.total_bytes + cache) * cut.held_bytes(hello.rank) // stored.total_bytes
        needed = part + partition.WORKING_BYTES
        if needed > hello.memory_bytes:
            raise DoesNotFit(
                f"rank {hello.rank} ({hello.host}) needs {shortfall.gigabytes(needed)} for its part of every "
                f"layer and {context} tokens of context, and has {shortfall.gigabytes(hello.memory_bytes)} "
                "free: use --split memory, a smaller --context, --parallel pipeline, more machines or a more "
                "quantized model"
            )


def weights_of(hellos: Sequence[Hello], options: ModelOptions) -> list[float]:
    """How much of every layer each rank gets: as asked, else by memory or by speed."""
    strategy, split = partition.parse_split(options.split)
    if split is not None:
        return [float(part) for part in split]
    if strategy == "memory":
        return [float(hello.memory_bytes) for hello in hellos]
    return speeds(hellos)


def speeds(hellos: Sequence[Hello]) -> list[float]:
    """How fast each rank reads weights, relative to the slowest; ranks that are nearly alike are alike.

    One measurement varies, and ranks on one host disturb each other's: equal devices count as equally fast.
    """
    best: dict[tuple[str, str], float] = {}
    for hello in hellos:
        kind = (hello.host, hello.device)
        best[kind] = max(best.get(kind, 0.0), hello.bytes_per_s)
    slowest = min(best.values())
    if max(best.values()) < NEARLY_ALIKE * slowest:
        return [1.0] * len(hellos)
    return [best[hello.host, hello.device] / slowest for hello in hellos]
