import mlx.core as mx
import pytest

from cluster import tiny_checkpoint
from lockstep.errors import LockstepError
from lockstep.model import checkpoint, loader
from lockstep.runtime import messages, selftest


def hello(rank):
    return messages.Hello(
        rank=rank,
        host=f"mini{rank}",
        pid=1,
        device="cpu",
        float32=True,
        memory_bytes=1,
        bytes_per_s=1.0,
        versions={},
        model="",
    )


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    found = checkpoint.inspect(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))
    return loader.load(found, (0, 6), 0, 1).shard


def test_a_model_that_computes_passes(shard):
    assert selftest.examine(0, 1, None, shard) == messages.Tested(0, "")


class Changed:
    """The shard with another output."""

    def __init__(self, shard, change):
        self.vocab_size, self.make_cache = shard.vocab_size, shard.make_cache
        self.replaceable = shard.replaceable
        self.forward = lambda *arguments: change(shard.forward(*arguments))


def test_numbers_that_are_not_finite_are_found(shard):
    broken = Changed(shard, lambda logits: logits * mx.nan)
    assert "not finite" in selftest.examine(0, 1, None, broken).fault


def test_two_answers_to_one_prompt_are_found(shard):
    calls = iter(range(100))
    moody = Changed(shard, lambda logits: logits + 1e-3 * next(calls))
    assert "two answers" in selftest.examine(0, 1, None, moody).fault


def test_the_first_stage_that_is_wrong_is_named():
    found = [messages.Tested(0, "not finite"), messages.Tested(1, "not finite"), messages.Tested(2, "")]
    with pytest.raises(LockstepError, match=r"rank 1 \(mini1\): not finite"):
        selftest.judge(found, [hello(rank) for rank in range(3)])
    selftest.judge([messages.Tested(rank, "") for rank in range(3)], [hello(rank) for rank in range(3)])
