import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.model.cpu.layout import cpu_layout
from lockstep.model.cpu.tiles import (
    FEWEST_ROWS,
    SMALL_PRODUCT,
    by_matrix,
    cpu_tiles,
    is_tiled,
    multiplied,
    tile_of,
    tiled,
    whole,
)
from model.cpu.given_cores import cores_given


def tile(layer, monkeypatch):
    """Whatever kernels this machine has."""
    set_kernels(monkeypatch, "SkylakeX")
    cpu_tiles(layer)
    cpu_layout(layer)


def set_kernels(monkeypatch, kernels):
    monkeypatch.setattr("lockstep.model.cpu.tiles.kernels", lambda: kernels)
    monkeypatch.setattr("lockstep.model.cpu.layout.kernels", lambda: kernels)


@pytest.mark.parametrize(("kernels", "wanted"), [("SkylakeX", True), ("Cooperlake", True), ("Zen", False)])
def test_tiles_are_for_avx_512(kernels, wanted, monkeypatch):
    set_kernels(monkeypatch, kernels)
    layer, table = nn.Linear(8, 16), nn.Embedding(16, 8)
    for module in (layer, table):
        cpu_tiles(module)
        cpu_layout(module)
        assert is_tiled(module) == wanted == (type(module) not in (nn.Linear, nn.Embedding))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), max_size=2),
    outputs=st.lists(st.sampled_from([16, 48, 64, 128]), min_size=1, max_size=3),
    inputs=st.sampled_from([1, 7, 64, 4000, 5632, 28672]),
    cores=st.integers(1, 4),
    dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    kernels=st.sampled_from(["SkylakeX", "Zen"]),
)
def test_tiles_and_matrices_multiply_alike(lengths, outputs, inputs, cores, dtype, kernels):
    # Of whole numbers, which no order of summation rounds.
    weights = [mx.random.randint(-3, 4, (count, inputs)).astype(mx.float32) for count in outputs]
    x = mx.random.randint(-3, 4, (*lengths, inputs)).astype(mx.float32)
    matrix = mx.concatenate(weights)
    tiles = tiled(weights, *tile_of(outputs, inputs))
    assert mx.array_equal(whole(tiles), matrix)
    wanted = x @ matrix.T
    for weight in (tiles, matrix):
        with cores_given(cores, "tiles.WORTH_A_CORE", 1000), pytest.MonkeyPatch.context() as patch:
            set_kernels(patch, kernels)
            result = multiplied(x, weight.astype(dtype))
        assert result.shape == wanted.shape
        assert mx.array_equal(result, wanted)


def test_more_products_than_mlx_can_count_in_one_call():
    # 300 groups of 7 rows, for each of which mlx counts all 8 million weights: beyond 2^31 it read elsewhere.
    weight = mx.random.randint(-3, 4, (2048, 4096)).astype(mx.float32)
    x = mx.random.randint(-3, 4, (3, 700, 4096)).astype(mx.float32)
    assert mx.array_equal(multiplied(x, tiled([weight], *tile_of([2048], 4096))), x @ weight.T)


def test_a_matrix_of_which_mlx_cannot_count_the_numbers_stays_as_it_is():
    assert tile_of([64 * 2**12], 2**13 - 64) is not None
    assert tile_of([64 * 2**12], 2**13) is None


def test_such_a_matrix_is_multiplied_by_whole(monkeypatch):
    set_kernels(monkeypatch, "SkylakeX")
    assert by_matrix(mx.zeros((8, 2**13)), mx.zeros((64 * 2**12, 2**13))).shape == (8, 64 * 2**12)


@given(count=st.integers(1, 100), inputs=st.integers(1, 1000), factor=st.sampled_from([1, 8, 32, 64]))
def test_a_few_rows_times_a_tile_are_a_small_product(count, inputs, factor):
    tile, parts = tile_of([16 * count], factor * inputs)
    assert 16 * count % tile == 0 == factor * inputs % parts
    assert FEWEST_ROWS * tile * (factor * inputs // parts) <= SMALL_PRODUCT


def test_outputs_that_tiles_do_not_fit_stay_as_they_are(monkeypatch):
    assert tile_of([64, 24], 8) is None
    assert tile_of([64], 1_000_003) is None
    layer, x = nn.Linear(8, 24), mx.random.normal((3, 8))
    before, wanted = layer.weight, layer(x)
    tile(layer, monkeypatch)
    assert mx.array_equal(layer["weight"], before)
    assert mx.array_equal(layer(x), wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_tiled_until_somebody_asks_for_its_weights(bias, monkeypatch):
    layer, x = nn.Linear(8, 48, bias=bias), mx.random.normal((3, 1, 8))
    before, wanted = layer.weight, layer(x)
    tile(layer, monkeypatch)
    assert is_tiled(layer)
    assert mx.allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert mx.array_equal(layer.weight, before)
    assert not is_tiled(layer)
    assert mx.allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)


def test_weights_that_a_model_sets_while_it_computes_count(monkeypatch):
    layer, x = nn.Linear(8, 48, bias=False), mx.random.normal((3, 8))
    wanted = layer(x)
    tile(layer, monkeypatch)
    layer.weight = 2 * layer.weight
    assert mx.allclose(layer(x), 2 * wanted, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_is_the_head_gives_rows_and_logits(monkeypatch):
    table, x, tokens = nn.Embedding(48, 8), mx.random.normal((2, 3, 8)), mx.array([[3, 47], [16, 0]])
    before, rows, logits = table.weight, table(tokens), table.as_linear(x)
    tile(table, monkeypatch)
    assert is_tiled(table)
    for _ in range(2):
        assert mx.array_equal(table(tokens), rows)
        assert mx.allclose(table.as_linear(x), logits, rtol=1e-5, atol=1e-6)
        assert mx.array_equal(table.weight, before)


def test_a_subclass_that_was_made_before_the_tiles_multiplies_by_them(monkeypatch):
    """As those are that sum over the ranks."""
    set_kernels(monkeypatch, "SkylakeX")
    layer, x = nn.Linear(8, 48), mx.random.normal((3, 8))
    wanted = 2 * layer(x)
    cpu_tiles(layer)
    call = type(layer).__call__
    layer.__class__ = type("Doubled", (type(layer),), {"__call__": lambda self, x: 2 * call(self, x)})
    cpu_layout(layer)
    assert is_tiled(layer)
    assert mx.allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)
