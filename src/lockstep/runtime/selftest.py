"""Before a run serves: do the ranks add up right, and does the model compute the same thing twice?

Every rank runs the same few steps, known beforehand, and tells rank 0 what it found.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from lockstep.engine.executor import Executor
from lockstep.engine.step import Create, Decode, Keep, Prefill, Step
from lockstep.errors import LockstepError
from lockstep.model.shard import Shard
from lockstep.runtime.messages import Hello, Tested

PROBE_TOKENS = 8
CHECKED_ELEMENTS = 1024


def examine(rank: int, size: int, group: mx.distributed.Group | None, shard: Shard) -> Tested:
    """Run the checks on this rank. Collective: every rank calls it at the same point."""
    faults = []
    if not _sums_are_right(rank, size, group):
        faults.append("all_sum over the ranks gave a wrong result")
    first, second = (_probe(shard) for _ in range(2))
    if not mx.isfinite(first).all().item():
        faults.append("the model gave numbers that are not finite")
    elif not mx.array_equal(first, second).item():
        faults.append("the model gave two answers to one prompt")
    return Tested(rank, "; ".join(faults))


def judge(found: Sequence[Tested], hellos: Sequence[Hello]) -> None:
    """Raises LockstepError naming the rank that differs.

    What is wrong on one stage is wrong on all behind it: the first stage in question is named.
    """
    wrong = [tested for tested in found if tested.fault]
    if wrong:
        culprit = max(wrong, key=lambda tested: tested.rank)
        raise LockstepError(
            f"the self-test failed on rank {culprit.rank} ({hellos[culprit.rank].host}): {culprit.fault}; "
            "--no-self-test starts anyway"
        )


def _sums_are_right(rank: int, size: int, group: mx.distributed.Group | None) -> bool:
    if group is None:
        return True
    numbers = mx.arange(CHECKED_ELEMENTS, dtype=mx.float32)
    summed = mx.distributed.all_sum(numbers * (rank + 1), group=group)
    return bool(mx.array_equal(summed, numbers * (size * (size + 1) // 2)).item())


def _probe(shard: Shard) -> mx.array:
    """This rank's output for the last token of a fixed prompt, in float32."""
    executor = Executor(shard)
    tokens = [(7 * i + 1) % shard.vocab_size for i in range(PROBE_TOKENS)]
    executor.start(Step(0, [Create(0, 1)], Prefill(0, [tokens[:-1]]))).wait()
    pending = executor.start(Step(1, [], Decode(0, tokens[-1:])))
    pending.wait()
    executor.start(Step(2, [Keep(0, [])])).wait()
    return pending.wanted[0].astype(mx.float32)
