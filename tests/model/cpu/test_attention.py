import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from lockstep.model.cpu.attention import Attention
from model.cpu.given_cores import cores_given


def near(ours, theirs):
    return mx.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def exact_attention(*arrays, **options):
    """mlx's own, in float64: in float32 it is as far from that as ours."""
    with mx.stream(mx.cpu):
        wide = [array.astype(mx.float64) for array in arrays]
        return mx.fast.scaled_dot_product_attention(*wide, **options).astype(mx.float32)


def masks(rows, heads, length, tokens):
    causal = mx.arange(tokens - length, tokens)[:, None] >= mx.arange(tokens)
    itself = mx.arange(tokens - length, tokens)[:, None] == mx.arange(tokens)
    padded = itself | (causal & (mx.arange(tokens) >= mx.arange(rows)[:, None, None, None]))
    return {
        "none": None,
        "causal": "causal",
        "seen": causal,
        "one for all": causal[-1:],
        "padded rows": padded,
        "of each head": mx.broadcast_to(padded, (rows, heads, length, tokens)),
        "added": mx.where(causal, mx.random.normal(causal.shape), -1e9),
    }


@pytest.mark.parametrize("mask", masks(1, 1, 1, 1))
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 5) | st.sampled_from([64, 65, 200]),
    before=st.integers(0, 6) | st.sampled_from([100, 3000]),
    loud=st.sampled_from([1.0, 10.0]),
    cores=st.integers(1, 3),
)
@example(rows=3, kv_heads=3, group=3, length=1, before=3000, loud=1.0, cores=2)  # keys come first
@example(rows=1, kv_heads=3, group=3, length=200, before=0, loud=1.0, cores=2)  # blocks of queries
@example(rows=2, kv_heads=3, group=2, length=65, before=3000, loud=1.0, cores=2)  # of heads, too
@example(rows=1, kv_heads=2, group=1, length=200, before=100, loud=10.0, cores=2)
def test_attention_is_that_of_mlx(mask, rows, kv_heads, group, length, before, loud, cores):
    heads, tokens = kv_heads * group, length + before
    mx.random.seed(rows + 10 * length)
    queries = loud * mx.random.normal((rows, heads, length, 8))
    keys, values = (mx.random.normal((rows, kv_heads, tokens, width)) for width in (8, 4))
    chosen = masks(rows, heads, length, tokens)[mask]
    fits = chosen.astype(mx.float64) if mask == "added" else chosen
    wanted = exact_attention(queries, keys, values, scale=0.3, mask=fits)
    attention = Attention()
    with cores_given(cores, "attention._WORTH_A_CORE", 100):
        for _ in range(2):
            assert near(attention(queries, keys, values, KVCache(), 0.3, chosen), wanted)


def test_another_mask_is_not_taken_for_the_last_one():
    attention, x = Attention(), mx.random.normal((1, 2, 3, 4))
    for seed in range(20):
        mx.random.seed(seed)
        mask = mx.random.uniform(shape=(3, 3)) < mx.eye(3) + 0.5
        wanted = mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, mask=mask)
        assert near(attention(x, x, x, None, 1.0, mask), wanted)
        del mask


def test_what_was_made_of_a_mask_goes_with_it():
    attention, x = Attention(), mx.random.normal((1, 2, 300, 4))
    masks = [mx.random.uniform(shape=(300, 300)) < chance + mx.eye(300) for chance in (0.2, 0.7)]
    mx.eval(x, masks)
    held = mx.get_active_memory()
    for _ in range(3):
        mx.eval(*(attention(x, x, x, None, 1.0, mask) for mask in masks))
    assert mx.get_active_memory() - held == pytest.approx(2 * 300 * 300 * 4, rel=0.1), "one for each mask"
    masks.clear()
    assert mx.get_active_memory() < held


def test_a_row_in_which_nothing_may_be_seen_stays_finite():
    ones = mx.ones((1, 2, 3, 4))
    assert mx.isfinite(Attention()(ones, ones, ones, None, 1.0, mx.zeros((3, 3), mx.bool_))).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_dtypes_are_left_to_mlx(dtype):
    x = mx.ones((1, 2, 3, 4), dtype)
    assert Attention()(x, x, x, None, 1.0, "causal").dtype == dtype


def test_sinks_and_quantized_caches_are_left_to_mlx_lm():
    x, sinks = mx.random.normal((1, 2, 3, 64)), mx.ones(2)
    wanted = base.scaled_dot_product_attention(x, x, x, None, 1.0, None, sinks=sinks)
    assert mx.array_equal(Attention()(x, x, x, None, 1.0, None, sinks=sinks), wanted)
    cache = QuantizedKVCache(group_size=64, bits=8)
    keys, values = cache.update_and_fetch(x, x)
    wanted = base.scaled_dot_product_attention(x, keys, values, cache, 1.0, None)
    assert mx.array_equal(Attention()(x, keys, values, cache, 1.0, None), wanted)
