import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from lockstep.model.cpu.experts import TiledExperts, cpu_experts, gathered, lay_out_experts, tiled, whole
from lockstep.model.cpu.tiles import TILES
from model.cpu.given_cores import cores_given


def tile(model, monkeypatch):
    """Whatever kernels this machine has."""
    monkeypatch.setattr("lockstep.model.cpu.experts.kernels", lambda: "SkylakeX")
    cpu_experts(model)
    lay_out_experts(model)


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(1, 5), max_size=2),
    each=st.integers(1, 3),
    rows=st.integers(1, 2),
    outputs=st.sampled_from([16, 48, 128]),
    tile=st.sampled_from(TILES),
    cores=st.integers(1, 3),
)
def test_tiles_multiply_like_the_experts_that_they_are_made_of(tokens, each, rows, outputs, tile, cores):
    outputs *= tile // 16
    # Of whole numbers, which no order of summation rounds.
    weight = mx.random.randint(-3, 4, (5, outputs, 24)).astype(mx.float32)
    x = mx.random.randint(-3, 4, (*tokens, 1, rows, 24)).astype(mx.float32)
    indices = mx.random.randint(0, 5, (*tokens, each))
    tiles = tiled(weight, tile)
    assert mx.array_equal(whole(tiles), weight)
    wanted = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices)
    with cores_given(cores, "experts.WORTH_A_CORE", 1000):
        result = gathered(x, tiles, indices)
    assert result.shape == wanted.shape
    assert mx.array_equal(result, wanted)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 40])  # the many are sorted by their experts
def test_a_mixture_gives_the_same_with_tiles(bias, tokens, monkeypatch):
    mixture = SwitchGLU(32, 48, 6, bias=bias)
    x, indices = mx.random.normal((1, tokens, 32)), mx.random.randint(0, 6, (1, tokens, 2))
    wanted = mixture(x, indices)
    tile(mixture, monkeypatch)
    for layer in (mixture.gate_proj, mixture.up_proj, mixture.down_proj):
        assert layer.are_tiles
    assert mx.allclose(mixture(x, indices), wanted, rtol=1e-4, atol=1e-6)


def test_experts_are_tiles_until_somebody_asks_for_their_weights(monkeypatch):
    layer, x, indices = SwitchLinear(8, 48, 3), mx.random.normal((2, 1, 1, 8)), mx.array([[0, 2], [1, 1]])
    before, wanted = layer.weight, layer(x, indices)
    tile(layer, monkeypatch)
    assert layer.are_tiles
    assert mx.array_equal(layer.weight, before)
    assert not layer.are_tiles
    assert mx.allclose(layer(x, indices), wanted, rtol=1e-5, atol=1e-6)


def test_outputs_that_tiles_do_not_fit_stay_as_they_are(monkeypatch):
    layer, x, indices = SwitchLinear(8, 24, 3), mx.random.normal((2, 1, 1, 8)), mx.array([[0], [2]])
    before, wanted = layer.weight, layer(x, indices)
    tile(layer, monkeypatch)
    assert mx.array_equal(layer["weight"], before)
    assert mx.array_equal(layer(x, indices), wanted)


def test_other_kernels_leave_experts_alone(monkeypatch):
    monkeypatch.setattr("lockstep.model.cpu.experts.kernels", lambda: "Zen")
    layer = SwitchLinear(8, 48, 3)
    cpu_experts(layer)
    assert not isinstance(layer, TiledExperts)


def test_experts_of_another_rank_have_no_weights_to_lay_out(monkeypatch):
    layer = SwitchLinear(8, 48, 3)
    layer["weight"] = None
    tile(layer, monkeypatch)
    assert layer["weight"] is None
