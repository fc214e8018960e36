"""Edits to real caches: whatever was done to a batch, a row's logits are those of its sequence alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from lockstep.engine.batch import detached
from lockstep.engine.executor import Executor
from lockstep.engine.step import (
    Create,
    Decode,
    Edit,
    Evict,
    Forward,
    Keep,
    Move,
    Prefill,
    Restore,
    Save,
    Step,
)
from lockstep.model import checkpoint, loader
from lockstep.model.shard import Shard
from model import tiny


class Runner:
    """An executor, the steps it has seen, and the logits of each decode."""

    def __init__(self, shard: Shard) -> None:
        self._logits: list[mx.array] = []
        self.executor = Executor(shard, self._keep)
        self._index = 0

    def _keep(self, step: Step, logits: mx.array) -> list[mx.array]:
        self._logits.append(logits[:, -1])
        return [mx.argmax(logits[:, -1], axis=-1), logits]

    def step(self, edits: list[Edit], forward: Forward | None = None) -> mx.array | None:
        pending = self.executor.start(Step(self._index, edits, forward))
        pending.wait()
        self._index += 1
        return self._logits.pop() if self._logits else None


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "falcon_h1", "deepseek_v3"])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save(request.param, folder)
    yield loader.load(checkpoint.inspect(folder), (0, 0), 0, 1).shard


A, B, C = [5, 9, 2, 7, 11, 3, 8], [4, 6, 1], [13, 2, 2, 8, 10]


def alone(shard: Shard, tokens: list[int]) -> mx.array:
    """The logits behind the last of `tokens`, computed at once."""
    return shard.forward(mx.array([tokens]), shard.make_cache())[0, -1]


def close(found: mx.array, expected: list[mx.array]) -> bool:
    wanted = mx.stack(expected)
    return bool((mx.abs(found - wanted).max() <= 1e-4 * mx.abs(wanted).max()).item())


def test_rows_of_different_lengths_are_prefilled_and_decoded_together(shard: Shard) -> None:
    runner = Runner(shard)
    runner.step([Create(0, 3)], Prefill(0, [A[:-1], B[:-1], C[:-1]]))
    logits = runner.step([], Decode(0, [A[-1], B[-1], C[-1]]))
    assert logits is not None
    assert close(logits, [alone(shard, A), alone(shard, B), alone(shard, C)])


def test_rows_come_and_go_without_touching_the_others(shard: Shard) -> None:
    runner = Runner(shard)
    runner.step([Create(0, 1)], Prefill(0, [A[:3]]))
    runner.step([], Prefill(0, [A[3:-1]]))
    runner.step([Create(1, 2)], Prefill(1, [B[:-1], C[:-1]]))
    both = runner.step([Move(0, 1, [1, 0])], Decode(0, [A[-1], C[-1], B[-1]]))
    assert both is not None
    assert close(both, [alone(shard, A), alone(shard, C), alone(shard, B)])
    left = runner.step([Keep(0, [2, 0])], Decode(0, [1, 12]))
    assert left is not None
    assert close(left, [alone(shard, [*B, 1]), alone(shard, [*A, 12])])
    split = runner.step([Move(5, 0, [1])], Decode(5, [3]))
    assert split is not None
    assert close(split, [alone(shard, [*A, 12, 3])])
    rest = runner.step([], Decode(0, [7]))
    assert rest is not None
    assert close(rest, [alone(shard, [*B, 1, 7])])
    runner.step([Keep(0, []), Keep(5, [])])
    assert not runner.executor.holds_anything


def test_a_decode_goes_ahead_with_the_tokens_that_were_broadcast(shard: Shard) -> None:
    told, goes_ahead = Runner(shard), Runner(shard)
    for runner in (told, goes_ahead):
        runner.step([Create(0, 3)], Prefill(0, [A[:-1], B[:-1], C[:-1]]))
        runner.step([], Decode(0, [A[-1], B[-1], C[-1]]))
    edits: list[Edit] = [Keep(0, [2, 0])]  # A place without a row may stay.
    tokens = [1, 12]
    for ahead in (False, True, True):
        expected = told.step(edits, Decode(0, tokens))
        found = goes_ahead.step(edits, Decode(0, [] if ahead else tokens, broadcast=True, ahead=2 * ahead))
        assert expected is not None and found is not None
        assert mx.array_equal(found, expected)
        edits, tokens = [], mx.argmax(expected, axis=-1).tolist()  # type: ignore[assignment]


def in_use() -> int:
    """Bytes of all arrays, once the device has let go of the last step's, and Python of other tests'."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def test_a_saved_prefix_keeps_its_row_in_memory_and_not_its_batch(shard: Shard) -> None:
    def kept(rows: int) -> int:
        runner = Runner(shard)
        runner.step([Create(0, rows)], Prefill(0, [[*range(1, 100)]] * rows))
        runner.step([], Decode(0, [3] * rows))
        runner.step([Save(0, 0, 100)], Decode(0, [4] * rows))
        runner.step([Keep(0, [])])
        with_entry = in_use()
        runner.step([Evict(100)])
        return with_entry - in_use()

    # Constants that another test has left may come and go meanwhile; the batch would be 8 times as much.
    assert 0 < kept(8) <= 1.5 * kept(1)


def test_a_saved_prefix_has_no_room_for_more_tokens() -> None:
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 2, 10, 4)), mx.ones((1, 2, 10, 4)))
    assert cache.keys.shape == (1, 2, cache.step, 4)
    detached([cache])
    assert cache.keys.shape == cache.values.shape == (1, 2, 10, 4)
    assert cache.offset == 10


def test_a_saved_prefix_can_be_continued_twice(shard: Shard) -> None:
    runner = Runner(shard)
    runner.step([Create(0, 2)], Prefill(0, [A[:-1], C[:-1]]))
    runner.step([Save(0, 0, 100)], Decode(0, [A[-1], C[-1]]))
    for batch, tokens in ((1, [*A[:-1], 12, 4]), (2, A)):
        runner.step([Restore(batch, 100, len(A) - 1)], None)
        for token in tokens[len(A) - 1 :]:
            logits = runner.step([], Decode(batch, [token]))
        assert logits is not None
        assert close(logits, [alone(shard, tokens)])
    if shard.trimmable:
        logits = runner.step([Restore(3, 100, 2)], Decode(3, [6]))
        assert logits is not None
        assert close(logits, [alone(shard, [*A[:2], 6])])
        runner.step([Keep(3, [])])
    runner.step([Evict(100), Keep(0, []), Keep(1, []), Keep(2, [])])
    assert not runner.executor.holds_anything
