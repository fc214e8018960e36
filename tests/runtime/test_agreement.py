"""What rank 0 makes of the ranks' introductions."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lockstep.errors import LockstepError, UsageError
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.costs import ModelCosts
from lockstep.runtime.agreement import agree, check_alike
from lockstep.runtime.messages import Hello
from lockstep.runtime.options import ModelOptions
from lockstep.runtime.rank import World

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


def test_a_pipeline_over_a_backend_that_cannot_send_is_refused() -> None:
    world = World(0, 2, "nccl", None, None, None)
    costs = ModelCosts((1, 1), (1, 1), 1, 1, True, (1, 1), (None, None), 1, 100, 10)
    with pytest.raises(UsageError, match="over nccl.*: use --parallel tensor or --backend ring"):
        agree(world, Checkpoint(Path(), {}, {}), costs, [FIRST, other()], ModelOptions(), print, 1.0)
