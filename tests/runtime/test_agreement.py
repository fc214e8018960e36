"""What rank 0 makes of the ranks' introductions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockstep.errors import LockstepError, UsageError
from lockstep.model import checkpoint
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.costs import ModelCosts
from lockstep.model.tensor import loader as tensor
from lockstep.model.tensor.plan import TensorPlan
from lockstep.runtime import agreement
from lockstep.runtime.agreement import agree, check_alike
from lockstep.runtime.messages import Assignment, Hello
from lockstep.runtime.options import ModelOptions
from lockstep.runtime.rank import World
from model import tiny
from model.two_ranks import TwoRanks

FIRST = Hello(
    rank=0,
    host="a",
    pid=1,
    device="cpu",
    float32=True,
    memory_bytes=10**9,
    bytes_per_s=10e9,
    versions={"mlx": "0.32.4", "mlx-lm": "0.32.2"},
    model="digest",
)


def other(**changes: object) -> Hello:
    return msgspec.structs.replace(FIRST, rank=1, host="b", **changes)


def test_equal_ranks_are_accepted() -> None:
    check_alike([FIRST, other()])


def test_a_rank_with_another_mlx_is_named_with_both_versions() -> None:
    old = other(versions=FIRST.versions | {"mlx": "0.31.0"})
    with pytest.raises(LockstepError, match=r"rank 1 \(b\) has mlx 0.31.0, rank 0 \(a\) has 0.32.4: install"):
        check_alike([FIRST, old])


def test_a_rank_with_another_model_is_named() -> None:
    with pytest.raises(LockstepError, match=r"rank 1 \(b\) has another model"):
        check_alike([FIRST, other(model="else")])


def test_a_rank_with_another_revision_is_named_with_both() -> None:
    first = msgspec.structs.replace(FIRST, revision="c0ffee")
    with pytest.raises(LockstepError, match=r"rank 1 \(b\) has the model's revision decade, .* c0ffee: name"):
        check_alike([first, other(revision="decade")])


def agreed(name: str, folder: Path, backend: str, parallel: str) -> Assignment:
    """What two ranks agree on that sum in no time."""
    tiny.save(name, folder)
    found = checkpoint.inspect(folder)
    world = World(0, 2, backend, TwoRanks(), None, None)
    costs = checkpoint.costs(found, "float32")
    return agree(world, found, costs, [FIRST, other()], ModelOptions(parallel=parallel), print, 1.0)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """The models that are checked for whether they can be cut by tensors."""
    seen: list[Checkpoint] = []
    check = tensor.check

    def counted(found: Checkpoint, *arguments: Any) -> TensorPlan:
        seen.append(found)
        return check(found, *arguments)

    monkeypatch.setattr(tensor, "check", counted)
    monkeypatch.setattr(agreement, "_all_reduce_latency_s", lambda world: 0.0)
    return seen


@pytest.mark.parametrize(("parallel", "count"), [("auto", 1), ("tensor", 1), ("pipeline", 0)])
def test_rank_0_tries_once_whether_a_model_can_be_cut_by_tensors(
    parallel: str, count: int, tmp_path: Path, checks: list[Checkpoint]
) -> None:
    assignment = agreed("llama", tmp_path, "ring", parallel)
    assert assignment.parallel == ("pipeline" if parallel == "pipeline" else "tensor")
    assert len(checks) == count


def test_a_model_that_cannot_be_cut_by_tensors_becomes_a_pipeline_where_nobody_has_asked_for_tensors(
    tmp_path: Path, checks: list[Checkpoint]
) -> None:
    assert agreed("mamba2", tmp_path, "ring", "auto").parallel == "pipeline"


@pytest.mark.parametrize(("backend", "parallel"), [("ring", "tensor"), ("nccl", "auto")])
def test_a_model_that_cannot_be_cut_by_tensors_is_refused_where_it_must_be(
    backend: str, parallel: str, tmp_path: Path, checks: list[Checkpoint]
) -> None:
    with pytest.raises(UsageError, match="mamba2"):
        agreed("mamba2", tmp_path, backend, parallel)


def test_a_pipeline_over_a_backend_that_cannot_send_is_refused() -> None:
    world = World(0, 2, "nccl", None, None, None)
    costs = ModelCosts((1, 1), (1, 1), 1, 1, True, (1, 1), (None, None), 1, 100, 10)
    with pytest.raises(UsageError, match="over nccl.*: use --parallel tensor or --backend ring"):
        agree(world, Checkpoint(Path(), {}, {}), costs, [FIRST, other()], ModelOptions(), print, 1.0)
