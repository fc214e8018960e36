"""Making a run ready: every rank joins, rank 0 decides who computes what, each loads its part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from lockstep.errors import LockstepError, LostPeer
from lockstep.model import checkpoint, loader, partition
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.costs import ModelCosts
from lockstep.model.kv_room import kv_room
from lockstep.model.pipeline import Neighbours
from lockstep.model.precision import computes_on_cpu
from lockstep.model.shard import Shard
from lockstep.model.tensor import loader as tensor
from lockstep.model.tensor.collectives import most_exchanged
from lockstep.runtime import faults, rank, selftest
from lockstep.runtime.agreement import agree
from lockstep.runtime.machine import hello
from lockstep.runtime.messages import Assignment, Failed, Hello, Ready
from lockstep.runtime.options import ModelOptions, Tell
from lockstep.runtime.place import Place
from lockstep.runtime.progress import AGREEING, IDLE, LOADING, TESTING
from lockstep.runtime.session import Member, Session
from lockstep.runtime.watchdog import Watchdog

MARGIN_S = 5.0
"""Who waits for a rank with a deadline of its own can name it; the watchdog comes after that."""

TEST_STEPS = 6
"""The self-test may take as long as so many slow steps."""


def open_session(place: Place, options: ModelOptions, tell: Tell, max_rows: int = 1) -> Session:
    """Join, agree on the partition, load. Raises LockstepError, on every rank, when any rank cannot.

    The hostfile's layers count where no `--split` was given; `max_rows` is the engine's.
    """
    env = place.env
    if options.split == "auto":
        options = replace(options, split=env.split)
    tell(f"joining {env.size} ranks over {env.backend}" if env.size > 1 else "starting")
    world = rank.join(place)
    try:
        return _open(world, place, options, tell, max_rows)
    except LockstepError as error:
        if world.leader is not None:
            world.leader.stop(str(error))
        if world.follower is not None and not isinstance(error, LostPeer):
            world.follower.report(Failed(world.rank, str(error)))
        place.watchdog.stop()
        world.close()
        raise


def _open(world: rank.World, place: Place, options: ModelOptions, tell: Tell, max_rows: int) -> Session:
    watchdog = place.watchdog
    found, costs = _find(watchdog, options)
    mine = hello(place, found.path)
    hellos, assignment = _agree(world, watchdog, found, costs, mine, options, tell)
    title = checkpoint.title(found.path)
    tell(f"loading {title}")
    loaded, kv_tokens = _load_part(world, watchdog, found, assignment, mine.memory_bytes, max_rows)
    ready = Ready(world.rank, loaded.weight_bytes, mx.get_peak_memory(), kv_tokens)
    readies = world.collect(ready, watchdog.deadlines.load_s, "load its layers")
    members = [
        Member(h.rank, h.host, h.pid, h.device, assignment.spans[h.rank], r.weight_bytes, r.peak_memory_bytes)
        for h, r in zip(hellos, readies, strict=True)
    ]
    for member in members if world.rank == 0 else []:
        tell(f"rank {member.rank} on {member.host}: {part(assignment, member.rank)}, {member.device}")
    if options.self_test:
        tell("testing the ranks")
        _test(world, watchdog, loaded.shard, hellos)
    watchdog.progress.enter(IDLE, 0.0)
    context = min(options.context or costs.max_context, costs.max_context)
    fitting = min(ready.kv_tokens for ready in readies)
    return Session(world, watchdog, found.path, title, loaded, assignment, members, context, fitting)


def _find(watchdog: Watchdog, options: ModelOptions) -> tuple[Checkpoint, ModelCosts]:
    """The model, and what it costs here. This may download it."""
    watchdog.progress.enter(LOADING, watchdog.deadlines.load_s + MARGIN_S)
    found = checkpoint.inspect(checkpoint.resolve(options.model))
    return found, checkpoint.costs(found, "float32" if computes_on_cpu() else "stored")


def _agree(
    world: rank.World,
    watchdog: Watchdog,
    found: Checkpoint,
    costs: ModelCosts,
    mine: Hello,
    options: ModelOptions,
    tell: Tell,
) -> tuple[list[Hello], Assignment]:
    """What each rank has (elsewhere than on rank 0 only this one), and what each computes."""
    deadlines = watchdog.deadlines
    # Rank 0 may need all of its own time before it begins to wait for the others.
    answer_s = 2 * deadlines.load_s + MARGIN_S
    watchdog.progress.enter(AGREEING, answer_s)
    hellos = world.collect(mine, deadlines.load_s, "find its model")
    if world.rank == 0:
        watchdog.progress.enter(AGREEING, deadlines.join_s)
    return hellos, agree(world, found, costs, hellos, options, tell, answer_s)


def _load_part(
    world: rank.World,
    watchdog: Watchdog,
    found: Checkpoint,
    assignment: Assignment,
    memory_bytes: int,
    max_rows: int,
) -> tuple[loader.Loaded, int]:
    """This rank's part of the model, and how many tokens of KV cache fit beside it."""
    watchdog.duty = part(assignment, world.rank)
    watchdog.measure = lambda: (mx.get_active_memory(), mx.get_peak_memory())
    watchdog.progress.enter(LOADING, watchdog.deadlines.load_s + MARGIN_S)
    if fault := faults.read(world.rank, os.environ):
        fault.while_loading()
    loaded = _load(world, found, assignment)
    mx.clear_cache()
    if assignment.compact and computes_on_cpu():
        mx.set_memory_limit(memory_bytes)  # What mlx converts ahead of the products waits for them then.
    free_bytes = memory_bytes - loaded.weight_bytes - partition.WORKING_BYTES
    return loaded, kv_room(loaded.shard).tokens(free_bytes, max_rows * assignment.stages)


def _test(world: rank.World, watchdog: Watchdog, shard: Shard, hellos: Sequence[Hello]) -> None:
    timeout_s = TEST_STEPS * watchdog.deadlines.step_s
    # Only rank 0 knows that all have loaded: the others may have to wait for a slow one in the test.
    slack_s = MARGIN_S if world.rank == 0 else MARGIN_S + watchdog.deadlines.load_s
    watchdog.progress.enter(TESTING, timeout_s + slack_s)
    with rank.naming_lost_peers():
        mine = selftest.examine(world.rank, world.size, world.group, shard)
    found = world.collect(mine, timeout_s, "get through the self-test")
    if world.rank == 0:
        selftest.judge(found, hellos)


def part(assignment: Assignment, number: int) -> str:
    """What rank `number` computes, in a few words."""
    if assignment.weights:
        return f"{assignment.weights[number] / sum(assignment.weights):.0%} of every layer"
    first, end = assignment.spans[number]
    return f"layers {first}-{end - 1}"


def _load(world: rank.World, found: Checkpoint, assignment: Assignment) -> loader.Loaded:
    wire = getattr(mx, assignment.wire) if assignment.wire else None
    compact = assignment.compact
    if assignment.parallel == "tensor" and world.group is not None:
        exchanged = most_exchanged(world.backend, world.group.size())
        if world.rank > 0:  # Rank 0 has done so before it decided.
            tensor.check(found, assignment.weights, world.group)
        return tensor.load(
            found, assignment.weights, world.group, wire=wire, exchanged_bytes=exchanged, compact=compact
        )
    span = assignment.spans[world.rank]
    neighbours = None
    if world.group is not None:
        neighbours = Neighbours(world.group, mx.new_stream(mx.cpu) if world.takes_threads else None)
    return loader.load(found, span, world.rank, world.size, neighbours, wire=wire, compact=compact)
