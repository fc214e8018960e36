"""A run that is ready: a loaded model, spread over all ranks, and the loop that its ranks are in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from lockstep.engine.executor import Executor, Finish
from lockstep.engine.grammar import Grammars
from lockstep.engine.limits import Limits
from lockstep.engine.scheduler import Scheduler
from lockstep.model import loader
from lockstep.model.precision import computes_on_cpu
from lockstep.runtime import faults, leaving, loop, rank
from lockstep.runtime.follower import FollowedSteps
from lockstep.runtime.leader import LedSteps
from lockstep.runtime.loop import Steps
from lockstep.runtime.messages import Assignment
from lockstep.runtime.options import EngineOptions
from lockstep.runtime.source import Source
from lockstep.runtime.watchdog import Watchdog

PREFILL_CHUNK, CPU_PREFILL_CHUNK = 512, 256
"""Tokens of a prefill step, which others wait for: a CPU computes no more of them faster."""

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
