import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.model.cpu.layout import lay_out
from lockstep.model.cpu.tiles import (
    FEWEST_ROWS,
    SMALL_PRODUCT,
    TiledEmbedding,
    TiledLinear,
    multiplied,
    multiplies_tiles,
    tile_of,
    tiled,
    whole,
)


@pytest.fixture
def small_products(monkeypatch):
    """Kernels that want tiles, whatever this machine has."""
    monkeypatch.setattr("lockstep.model.cpu.layout.kernels", lambda: "SkylakeX")
    monkeypatch.setattr("lockstep.model.cpu.layout.multiplies_tiles", lambda: True)


@pytest.mark.parametrize(
    ("kernels", "threads", "wanted"),
    [("SkylakeX", 1, True), ("Cooperlake", 1, True), ("Cooperlake", 2, False), ("Zen", 1, False)],
)
def test_tiles_are_for_one_thread_with_avx_512(kernels, threads, wanted, monkeypatch):
    monkeypatch.setattr("lockstep.model.cpu.tiles.kernels", lambda: kernels)
    monkeypatch.setattr("lockstep.model.cpu.tiles.threads", lambda: threads)
    assert multiplies_tiles() == wanted


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=3),
    outputs=st.lists(st.sampled_from([16, 48, 64, 128]), min_size=1, max_size=3),
    inputs=st.sampled_from([1, 7, 64, 4000, 5632, 8191]),
)
def test_tiles_multiply_like_the_matrices_that_they_are_made_of(lengths, outputs, inputs):
    weights = [mx.random.normal((count, inputs)) / math.sqrt(inputs) for count in outputs]
    x = mx.random.normal((*lengths, inputs))
    matrix = mx.concatenate(weights)
    tiles = tiled(weights, *tile_of(outputs, inputs))
    assert mx.array_equal(whole(tiles), matrix)
    result, wanted = multiplied(x, tiles), x @ matrix.T
    assert result.shape == wanted.shape
    assert mx.allclose(result, wanted, rtol=1e-4, atol=1e-5)


@given(count=st.integers(1, 100), inputs=st.integers(1, 50_000))
def test_a_few_rows_times_a_tile_are_a_small_product(count, inputs):
    tile, parts = tile_of([16 * count], inputs)
    assert 16 * count % tile == 0 == inputs % parts
    assert FEWEST_ROWS * tile * (inputs // parts) <= SMALL_PRODUCT


def test_outputs_that_tiles_do_not_fit_stay_as_they_are(small_products):
    assert tile_of([64, 24], 8) is None
    layer = nn.Linear(8, 24)
    before = layer.weight
    lay_out(layer, [before])
    assert type(layer) is nn.Linear
    assert mx.array_equal(layer.weight, before)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_tiled_until_somebody_asks_for_its_weights(bias, small_products):
    layer, x = nn.Linear(8, 48, bias=bias), mx.random.normal((3, 1, 8))
    before, wanted = layer.weight, layer(x)
    lay_out(layer, [before])
    assert type(layer) is TiledLinear
    assert layer["weight"].size == before.size
    assert mx.allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert mx.array_equal(layer.weight, before)
    assert type(layer) is nn.Linear
    assert mx.array_equal(layer["weight"], before)


def test_weights_that_a_model_sets_while_it_computes_count(small_products):
    layer, x = nn.Linear(8, 48, bias=False), mx.random.normal((3, 8))
    wanted = layer(x)
    lay_out(layer, [layer.weight])
    layer.weight = 2 * layer.weight
    assert mx.allclose(layer(x), 2 * wanted, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_is_the_head_gives_rows_and_logits(small_products):
    table, x, tokens = nn.Embedding(48, 8), mx.random.normal((2, 3, 8)), mx.array([[3, 47], [16, 0]])
    before, rows, logits = table.weight, table(tokens), table.as_linear(x)
    lay_out(table, [before])
    assert type(table) is TiledEmbedding
    assert mx.array_equal(table(tokens), rows)
    assert mx.allclose(table.as_linear(x), logits, rtol=1e-5, atol=1e-6)
    assert mx.array_equal(table.weight, before)
    assert type(table) is nn.Embedding
    assert mx.array_equal(table(tokens), rows)
