"""Who computes what: every rank says what it has, rank 0 decides and tells all."""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx
import msgspec

from lockstep.engine.step import Stop
from lockstep.errors import LockstepError, LostPeer, UsageError
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.costs import ModelCosts
from lockstep.model.parallel import Traffic, choose
from lockstep.model.tensor import loader as tensor
from lockstep.model.tensor.collectives import Meeting, most_exchanged
from lockstep.model.tensor.plan import TensorPlan
from lockstep.runtime.division import by_layers, by_tensors, weights_of
from lockstep.runtime.messages import Assignment, Hello
from lockstep.runtime.options import ModelOptions, Tell
from lockstep.runtime.rank import World

_PROBES = 20
_PROBE_WIDTH = 2048


def agree(
    world: World,
    found: Checkpoint,
    costs: ModelCosts,
    hellos: Sequence[Hello],
    options: ModelOptions,
    tell: Tell,
    timeout_s: float,
) -> Assignment:
    """What each rank computes. `hellos` are everybody's on rank 0, this rank's own elsewhere.

    The others wait `timeout_s` for rank 0, which may still be waiting for a rank that is slow.
    Raises LostPeer where rank 0 gave up; on rank 0 LockstepError for ranks that do not match, UsageError
    for a model that does not fit or cannot be cut as asked.
    """
    latency_s = _all_reduce_latency_s(world) if options.parallel == "auto" else 0.0
    if world.follower is None:
        check_alike(hellos)
        assignment = _decide(world, found, costs, hellos, options, latency_s, tell)
        if world.leader is not None:
            world.leader.publish(assignment)
        return assignment
    message = world.follower.receive(timeout_s)
    if isinstance(message, Stop):
        raise LostPeer(message.reason)
    assert isinstance(message, Assignment), message
    return message


def check_alike(hellos: Sequence[Hello]) -> None:
    """Refuse ranks that would compute something else than rank 0. Raises LockstepError."""
    first = hellos[0]
    for other in hellos[1:]:
        for name, version in other.versions.items():
            if version != first.versions[name]:
                raise LockstepError(
                    f"rank {other.rank} ({other.host}) has {name} {version}, rank 0 ({first.host}) has "
                    f"{first.versions[name]}: install the same version on every host"
                )
        if other.revision and first.revision and other.revision != first.revision:
            raise LockstepError(
                f"rank {other.rank} ({other.host}) has the model's revision {other.revision}, rank 0 "
                f"({first.host}) has {first.revision}: name one for all, as in --model org/name@revision"
            )
        if other.model != first.model:
            raise LockstepError(
                f"rank {other.rank} ({other.host}) has another model than rank 0 under the same name "
                "(config.json differs): copy the same folder to every host"
            )


def _decide(
    world: World,
    found: Checkpoint,
    costs: ModelCosts,
    hellos: Sequence[Hello],
    options: ModelOptions,
    latency_s: float,
    tell: Tell,
) -> Assignment:
    parallel = options.parallel
    cut: TensorPlan | None = None
    refusal: UsageError | None = None
    if parallel != "pipeline" and world.group is not None:
        try:
            cut = tensor.check(found, weights_of(hellos, options), world.group)
        except UsageError as error:
            refusal = error
    if parallel == "auto":
        traffic = Traffic(
            read_bytes=sum(costs.read_bytes) + costs.head_bytes,
            all_reduces=2 * costs.layers + 1,
            latency_s=latency_s,
            bytes_per_s=[hello.bytes_per_s for hello in hellos],
        )
        parallel, reason = choose(traffic, world.backend, None if refusal is None else str(refusal))
        if world.size > 1:
            tell(f"{parallel} parallel: {reason}")
    if parallel == "tensor" and refusal is not None:
        raise refusal
    if parallel == "tensor" and cut is not None:
        divided = by_tensors(cut, found, hellos, options)
    else:
        divided = by_layers(world, found, hellos, options)
    if divided.too_little:
        tell(f"weights stay as stored, which is slower; in float32 {divided.too_little}")
    wire = "float32" if len({hello.float32 for hello in hellos}) > 1 else None
    return msgspec.structs.replace(divided.assignment, wire=wire)


def _all_reduce_latency_s(world: World) -> float:
    """Seconds for one small all_reduce. Collective: every rank calls it, rank 0's clock counts."""
    if world.group is None:
        return 0.0
    value = mx.zeros((_PROBE_WIDTH,))
    meeting = Meeting(world.group, exchanged_bytes=most_exchanged(world.backend, world.group.size()))
    seconds = []
    for _ in range(_PROBES):
        began = time.perf_counter()
        value = meeting.sum(value)
        mx.eval(value)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[_PROBES // 2]
