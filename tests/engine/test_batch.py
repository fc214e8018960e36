"""Batches of real caches whose rows come and go: every row's logits stay those of its sequence alone."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.batch import Batch
from lockstep.model import checkpoint, loader
from lockstep.model.shard import Shard
from model import tiny


def loaded(kind: str, folder: Path) -> Shard:
    tiny.save(kind, folder)
    return loader.load(checkpoint.inspect(folder), (0, 0), 0, 1).shard


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Its rows can take each other's places."""
    shard = loaded("qwen2", tmp_path_factory.mktemp("qwen2"))
    assert shard.replaceable
    return shard


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Its caches keep the last few tokens, and are copied whenever rows come or go."""
    shard = loaded("gemma3_text", tmp_path_factory.mktemp("gemma3"))
    assert not shard.replaceable
    return shard


@pytest.fixture(scope="module", params=["plain", "windowed"])
def shard(request: pytest.FixtureRequest) -> Shard:
    kind: Shard = request.getfixturevalue(request.param)
    return kind


def prefilled(shard: Shard, prompts: list[list[int]]) -> Batch:
    batch = Batch.of_rows([shard.make_cache() for _ in prompts], replaceable=shard.replaceable)
    lengths = [len(prompt) for prompt in prompts]
    if len(prompts) > 1:
        batch.pad_right(lengths)
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    mx.eval(shard.forward(mx.array(padded), batch.caches), batch.state())
    if len(prompts) > 1:
        batch.unpad()
    batch.note_seen(lengths)
    return batch


def decoded(shard: Shard, batch: Batch, tokens: list[int]) -> mx.array:
    """Logits [rows, vocab] behind one more token of each row."""
    output = shard.forward(batch.spread(mx.array(tokens)), batch.caches)
    batch.note_seen([1] * batch.rows)
    mx.eval(output, batch.state())
    return batch.visible(output)[:, -1]


def places(batch: Batch) -> int:
    """That compute, with and without a row."""
    return int(batch.spread(mx.array([1] * batch.rows)).shape[0])


@dataclass
class Rows:
    """A batch, and what each of its rows has seen."""

    shard: Shard
    batch: Batch
    seen: list[list[int]] = field(default_factory=list)

    def decode(self, token: int) -> mx.array:
        tokens = [(token + 7 * row) % 100 + 1 for row in range(self.batch.rows)]
        self.seen = [[*seen, more] for seen, more in zip(self.seen, tokens, strict=True)]
        return decoded(self.shard, self.batch, tokens)

    def check(self) -> None:
        found = self.decode(50)
        for row in range(self.batch.rows):
            alone = self.shard.forward(mx.array([self.seen[row]]), self.shard.make_cache())[0, -1]
            assert mx.abs(found[row] - alone).max().item() <= 1e-4 * mx.abs(alone).max().item(), row


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_rows_come_and_go_in_any_order(shard: Shard, data: st.DataObject) -> None:
    length = st.integers(1, 20)
    prompts = [[(5 * i + row) % 100 + 1 for i in range(data.draw(length))] for row in range(16)]
    rows = Rows(shard, prefilled(shard, prompts), prompts)
    for turn in range(8):
        if len(rows.seen) > 1 and data.draw(st.booleans(), "leave"):
            gone = data.draw(st.integers(0, len(rows.seen) - 1))
            kept = [row for row in range(len(rows.seen)) if row != gone]
            rows.batch.keep(kept)
            rows.seen = [rows.seen[row] for row in kept]
        if data.draw(st.booleans(), "join"):
            new = [[3 * turn + 1] * data.draw(length) for _ in range(data.draw(st.integers(1, 2)))]
            rows.batch.join(prefilled(shard, new))
            rows.seen += new
        if len(rows.seen) > 2 and data.draw(st.booleans(), "move"):
            moved = rows.batch.take([2, 0])
            others = Rows(shard, moved, [rows.seen[2], rows.seen[0]])
            others.decode(turn)
            rows.batch.join(moved)
            rows.seen = [rows.seen[1], *rows.seen[3:], *others.seen]
        rows.decode(turn)
    rows.check()


def test_a_row_takes_the_place_of_one_that_left_and_nothing_else_is_copied(plain: Shard) -> None:
    batch = prefilled(plain, [[1 + row] * 100 for row in range(16)])
    new = prefilled(plain, [[9] * 50])
    decoded(plain, batch, [2] * 16)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    batch.keep([row for row in range(16) if row != 5])
    assert places(batch) == 16
    batch.join(new)
    mx.eval(batch.state())
    assert places(batch) == batch.rows == 16
    layer_bytes = sum(array.nbytes for array in batch.state()[0][:2])
    assert mx.get_peak_memory() - before < layer_bytes / 2


def test_a_batch_gives_memory_back_when_many_of_its_places_have_no_row(shard: Shard) -> None:
    batch = prefilled(shard, [[1 + row] * 20 for row in range(16)])
    for rows in range(15, 0, -1):
        batch.keep(list(range(1, rows + 1)))
        assert rows <= places(batch) <= rows * 8 / 7
    assert all(array.shape[0] == 1 for array in batch.state()[0][:2])


def test_a_batch_gives_memory_back_when_its_longest_row_leaves(plain: Shard) -> None:
    batch = prefilled(plain, [[1] * 300, *([2] * 20 for _ in range(15))])
    batch.keep(list(range(1, 16)))
    assert batch.caches[0].size() == 20
