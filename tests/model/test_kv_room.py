"""What caches take is measured on the caches themselves, and bounds what may run at once."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from lockstep.model.checkpoint import inspect
from lockstep.model.kv_room import KvRoom, kv_room
from lockstep.model.loader import load


@pytest.mark.parametrize(
    ("name", "layers", "each"),
    [
        ("qwen3", 6, 256),
        ("qwen3_next", 3, 256),
        ("falcon_h1", 6, 256),
        ("mamba2", 0, 0),
        ("gpt_oss", 3, 256),
        ("deepseek_v3", 6, 4 * (16 + 8)),
    ],
)
def test_only_caches_that_grow_count_for_every_token(name, layers, each, tmp_path):
    tiny.save(name, tmp_path)
    shard = load(inspect(tmp_path), (0, 6), 0, 1).shard
    room = kv_room(shard)
    assert room.per_token == layers * each
    cache = shard.make_cache()
    shard.forward(mx.zeros((1, 1), mx.int32), cache)
    leaves = [leaf for _, leaf in tree_flatten([c.state for c in cache]) if isinstance(leaf, mx.array)]
    windows = sum(size * each for size, each in room.windows.items())
    # A cache that grows begins with room for 256 tokens.
    assert sum(leaf.nbytes for leaf in leaves) == 256 * room.per_token + windows + room.per_row


sizes = st.integers(0, 100)


@given(sizes, st.dictionaries(st.integers(1, 50), sizes, max_size=3), sizes, st.integers(0, 10**5), st.data())
def test_tokens_that_are_said_to_fit_do_however_they_are_spread_over_rows(each, windows, row, free, data):
    rows = data.draw(st.integers(1, 8))
    room = KvRoom(each, windows, row)
    tokens = room.tokens(free, rows)
    lengths = [0] * rows
    for i in range(rows - 1):
        lengths[i] = data.draw(st.integers(0, tokens - sum(lengths)))
    lengths[-1] = tokens - sum(lengths)
    grown = sum(each * n + sum(min(n, w) * size for w, size in windows.items()) for n in lengths)
    assert grown + min(rows * row, free // 2) <= free


def test_a_full_window_does_not_count_for_the_tokens_beyond_it():
    assert KvRoom(10, {100: 90}, 0).tokens(20_000, 1) == (20_000 - 100 * 90) // 10
    assert KvRoom(10, {100: 90}, 0).tokens(5_000, 1) == 50
    assert KvRoom(10, {}, 1_000).tokens(20_000, 4) == 1_600
