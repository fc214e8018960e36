"""Making a run ready: every rank joins, rank 0 decides who computes what, each loads its shard."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import msgspec
import psutil

from lockstep.engine.executor import Executor, Finish
from lockstep.engine.scheduler import Limits
from lockstep.engine.step import Stop
from lockstep.errors import LockstepError, LostPeer
from lockstep.model import checkpoint, loader, partition
from lockstep.model.costs import ModelCosts
from lockstep.model.precision import BlasChoice, computes_on_cpu
from lockstep.runtime import rank
from lockstep.runtime.channel import Assignment, Failed, Hello, Ready
from lockstep.runtime.environment import RankEnvironment
from lockstep.runtime.options import EngineOptions, ModelOptions, Progress

JOIN_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 1800.0
VERSIONED = ("mlx", "mlx-lm", "mlx-lockstep")


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
    path: Path
    name: str
    loaded: loader.Loaded
    members: Sequence[Member]
    max_context: int
    kv_tokens: int

    @property
    def backend(self) -> str:
        return self.world.backend if self.world.size > 1 else "none"

    @property
    def parallel(self) -> str:
        return "pipeline" if self.world.size > 1 else "none"

    @property
    def stages(self) -> int:
        """How many steps the ranks can work on at the same time."""
        return self.world.size

    def limits(self, engine: EngineOptions) -> Limits:
        """What these ranks can do at once."""
        shard = self.loaded.shard
        return Limits(
            lanes=self.stages,
            kv_tokens=self.kv_tokens,
            max_context=self.max_context,
            max_rows=engine.max_rows,
            max_queue=engine.max_queue,
            prefill_chunk=engine.prefill_chunk,
            prompt_cache_tokens=min(engine.prompt_cache_tokens, self.kv_tokens // 2),
            trim_limit=None if shard.trimmable else 0,
            batchable=shard.batchable,
        )

    def executor(self, finish: Finish | None = None) -> Executor:
        return Executor(self.loaded.shard, finish)


def open_session(
    env: RankEnvironment, blas: BlasChoice, options: ModelOptions, progress: Progress
) -> Session:
    """Join, agree on the partition, load. Raises LockstepError, on every rank, when any rank cannot."""
    progress(f"joining {env.size} ranks over {env.backend}" if env.size > 1 else "starting")
    world = rank.join(env)
    try:
        return _open(world, env, blas, options, progress)
    except LockstepError as error:
        if world.leader is not None:
            world.leader.publish(Stop(str(error)))
        if world.follower is not None and not isinstance(error, LostPeer):
            world.follower.report(Failed(world.rank, str(error)))
        world.close()
        raise


def _open(
    world: rank.World, env: RankEnvironment, blas: BlasChoice, options: ModelOptions, progress: Progress
) -> Session:
    path = checkpoint.resolve(options.model)
    inspected = checkpoint.inspect(path)
    costs = checkpoint.costs(inspected, float32=computes_on_cpu())
    mine = _hello(world, env, blas, path)
    hellos = [mine]
    if world.follower is not None:
        world.follower.report(mine)
    if world.leader is not None:
        hellos += world.leader.gather(Hello, world.size, JOIN_TIMEOUT_S, "join")
        _check_alike(hellos)
    spans = _assign(world, costs, hellos, options)
    progress(f"loading {path.name}")
    span = spans[world.rank]
    held = inspected.tensors_for(span, embedding=world.rank == world.size - 1, head=world.rank == 0)
    inspected.fetch(tensor.file for tensor in held.values())
    loaded = loader.load(path, span, world.rank, world.size, world.group)
    mx.clear_cache()
    kv_tokens = _kv_tokens(costs, span, mine.memory_bytes - loaded.weight_bytes)
    readies = [Ready(world.rank, loaded.weight_bytes, mx.get_peak_memory(), kv_tokens)]
    if world.follower is not None:
        world.follower.report(readies[0])
    if world.leader is not None:
        readies += world.leader.gather(Ready, world.size, LOAD_TIMEOUT_S, "load its layers")
    members = [
        Member(h.rank, h.host, h.pid, h.device, spans[h.rank], r.weight_bytes, r.peak_memory_bytes)
        for h, r in zip(hellos, readies, strict=True)
    ]
    for member in members if world.rank == 0 else []:
        first, end = member.layers
        progress(f"rank {member.rank} on {member.host}: layers {first}-{end - 1}, {member.device}")
    context = min(options.context or costs.max_context, costs.max_context)
    return Session(world, path, path.name, loaded, members, context, min(r.kv_tokens for r in readies))


def _hello(world: rank.World, env: RankEnvironment, blas: BlasChoice, path: Path) -> Hello:
    return Hello(
        rank=world.rank,
        host=world.host,
        pid=os.getpid(),
        device=_device(blas),
        memory_bytes=env.memory_bytes or _free_memory_bytes(world.local_size),
        versions={name: importlib.metadata.version(name) for name in VERSIONED},
        model=hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
    )


def _device(blas: BlasChoice) -> str:
    """What computes, in a few words; on CPU float32, with the BLAS that does the work."""
    name = mx.device_info(mx.default_device()).get("device_name", "")
    if not computes_on_cpu():
        return f"gpu {name}".strip()
    threads = "" if blas.threads is None else f", {blas.threads} threads"
    return f"cpu {name}, float32 with {blas.name}{threads}"


def _free_memory_bytes(local_size: int) -> int:
    """This rank's part of what its device has free."""
    if computes_on_cpu():
        return psutil.virtual_memory().available // local_size
    info = mx.device_info(mx.default_device())
    total = info.get("max_recommended_working_set_size") or info.get("total_memory") or info["memory_size"]
    return (int(total) - mx.get_active_memory()) // local_size


def _check_alike(hellos: Sequence[Hello]) -> None:
    """Refuse ranks that would compute something else than rank 0."""
    first = hellos[0]
    for other in hellos[1:]:
        for name, version in other.versions.items():
            if version != first.versions[name]:
                raise LockstepError(
                    f"rank {other.rank} ({other.host}) has {name} {version}, rank 0 ({first.host}) has "
                    f"{first.versions[name]}: install the same version on every host"
                )
        if other.model != first.model:
            raise LockstepError(
                f"rank {other.rank} ({other.host}) has another model than rank 0 under the same name "
                "(config.json differs): copy the same folder to every host"
            )


def _assign(
    world: rank.World, costs: ModelCosts, hellos: Sequence[Hello], options: ModelOptions
) -> Sequence[tuple[int, int]]:
    if world.follower is not None:
        message = world.follower.receive(JOIN_TIMEOUT_S)
        if isinstance(message, Stop):
            raise LostPeer(message.reason)
        assert isinstance(message, Assignment), message
        return message.spans
    strategy, split = partition.parse_split(options.split)
    resources = [partition.RankResources(hello.memory_bytes, hello.host) for hello in hellos]
    context = min(options.context or partition.DEFAULT_CONTEXT, costs.max_context)
    spans = list(partition.plan(costs, resources, strategy, split, context).spans)
    if world.leader is not None:
        world.leader.publish(Assignment(spans))
    return spans


def _kv_tokens(costs: ModelCosts, span: tuple[int, int], free_bytes: int) -> int:
    """How many tokens of KV cache fit beside the weights of these layers."""
    per_token = sum(costs.kv_bytes_per_token[span[0] : span[1]])
    return max(0, free_bytes - partition.WORKING_BYTES) // max(per_token, 1)
