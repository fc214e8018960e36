"""Making a run ready: every rank joins, rank 0 decides who computes what, each loads its part."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import msgspec

from lockstep.engine.executor import Executor, Finish
from lockstep.engine.grammar import Grammars
from lockstep.engine.limits import Limits
from lockstep.engine.scheduler import Scheduler
from lockstep.errors import LockstepError, LostPeer
from lockstep.model import checkpoint, loader, partition
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.costs import ModelCosts
from lockstep.model.kv_room import kv_room
from lockstep.model.pipeline import Neighbours
from lockstep.model.precision import computes_on_cpu
from lockstep.model.shard import Shard
from lockstep.model.tensor import loader as tensor
from lockstep.model.tensor.collectives import EXCHANGED_BYTES
from lockstep.runtime import faults, leaving, loop, rank, selftest
from lockstep.runtime.agreement import agree
from lockstep.runtime.follower import FollowedSteps
from lockstep.runtime.leader import LedSteps
from lockstep.runtime.loop import Steps
from lockstep.runtime.machine import hello
from lockstep.runtime.messages import Assignment, Failed, Hello, Ready
from lockstep.runtime.options import EngineOptions, ModelOptions, Tell
from lockstep.runtime.place import Place
from lockstep.runtime.progress import AGREEING, IDLE, LOADING, TESTING
from lockstep.runtime.source import Source
from lockstep.runtime.watchdog import Watchdog

MARGIN_S = 5.0
"""Who waits for a rank with a deadline of its own can name it; the watchdog comes after that."""

PREFILL_CHUNK, CPU_PREFILL_CHUNK = 512, 256
"""Tokens of a prefill step, which others wait for: a CPU computes no more of them faster."""

TEST_STEPS = 6
"""The self-test may take as long as so many slow steps."""

Result = TypeVar("Result")


class Member(msgspec.Struct, frozen=True):
    """One rank of the run, as people are shown it."""

    rank: int
    host: str
    pid: int
    device: str
    layers: tuple[int, int]
    weight_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Session:
    """A loaded model, spread over all ranks. `members` is complete on rank 0 only."""

    world: rank.World
    watchdog: Watchdog
    path: Path
    name: str
    loaded: loader.Loaded
    assignment: Assignment
    members: Sequence[Member]
    max_context: int
    kv_tokens: int

    @property
    def backend(self) -> str:
        return self.world.backend if self.world.size > 1 else "none"

    @property
    def parallel(self) -> str:
        return self.assignment.parallel if self.world.size > 1 else "none"

    def limits(self, engine: EngineOptions) -> Limits:
        """What these ranks can do at once."""
        shard, stages, on_cpu = self.loaded.shard, self.assignment.stages, computes_on_cpu()
        # A CPU alone has nobody to wait for. Of a row that ended, a cache that went ahead has to be cut back.
        gains = self.world.size > 1 or not on_cpu
        looks_ahead = stages == 1 and gains and (shard.trimmable or not engine.prompt_cache_tokens)
        return Limits(
            lanes=stages,
            kv_tokens=self.kv_tokens,
            max_context=self.max_context,
            max_rows=engine.max_rows,
            max_queue=engine.max_queue,
            prefill_chunk=engine.prefill_chunk or (CPU_PREFILL_CHUNK if on_cpu else PREFILL_CHUNK),
            prompt_cache_tokens=min(engine.prompt_cache_tokens, self.kv_tokens // 2),
            trimmable=shard.trimmable,
            batchable=shard.batchable,
            look_ahead=looks_ahead,
        )

    def run(self, on_rank_0: Callable[[Session], Result]) -> Result | None:
        """The whole run: rank 0 does `on_rank_0`, which leads, the others follow; then this rank leaves.

        Returns what `on_rank_0` has returned, on the others None. Raises LostPeer when another rank ends
        before that.
        """
        result = None
        if self.world.rank == 0:
            result = on_rank_0(self)
        else:
            self.follow()
        self.close()
        return result

    def follow(self) -> None:
        """Execute the steps that rank 0 publishes, to their end."""
        assert self.world.follower is not None, "rank 0 leads"
        self._execute(FollowedSteps(self.world.follower))

    def lead(self, scheduler: Scheduler, source: Source, grammars: Grammars | None = None) -> None:
        """On rank 0: make, publish and execute steps for what `source` asks for, until it is closed."""
        steps = LedSteps(scheduler, source, self.world.leader, grammars)
        self.watchdog.progress.never_rests()
        self._execute(steps, steps.finish)

    def close(self) -> None:
        """Leave the run, at its end. What comes after it waits for no other rank, or not for ever."""
        if self.backend == "mpi" and self.world.rank == 0:
            # The others wait as long as rank 0's reader wants.
            leaving.bound_finalizer()
        self.watchdog.stop()
        self.world.close()

    def _execute(self, steps: Steps, finish: Finish | None = None) -> None:
        fault = faults.read(self.world.rank, os.environ)
        with rank.naming_lost_peers():
            loop.run(Executor(self.loaded.shard, finish), steps, self.watchdog.progress, fault)


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
        exchanged = EXCHANGED_BYTES.get(world.backend, 0)
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
