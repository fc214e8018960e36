from contextlib import nullcontext

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.model.cpu import blocks


@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 8),
    block=st.integers(1, 400),
    unit=st.integers(1, 4),
)
def test_blocks_make_the_whole(outputs, inputs, block, unit):
    weight, added = mx.random.randint(-9, 10, (outputs, inputs)), mx.arange(outputs)
    seen = []

    def product(few, more):
        seen.append(few.shape[0])
        return few.sum(axis=1) + more

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        result = blocks.by_blocks(product, [weight, added], weight.size, unit)
    assert mx.array_equal(result, weight.sum(axis=1) + added)
    assert max(seen) <= max(block // inputs, unit)
    assert all(count % unit == 0 for count in seen[:-1])


def test_a_graph_to_look_at_has_one_block(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1)
    seen = []
    for block in (blocks.in_one_block, nullcontext):
        with block():
            blocks.by_blocks(lambda few: seen.append(len(few)) or few.sum(axis=1), [mx.ones((4, 2))], 8)
    assert seen == [4, 1, 1, 1, 1]


def test_only_some_blocks_are_float32_at_a_time(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 10_000)
    weight, x = mx.ones((5000, 1000), mx.bfloat16), mx.ones((1, 1000))
    mx.eval(weight, x)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(blocks.by_blocks(lambda block: x @ block.astype(mx.float32).T, [weight], weight.size))
    # mlx makes room for what about 100 operations will compute.
    assert mx.get_peak_memory() - held < 60 * 10_000 * 4 < weight.size * 4 / 8
