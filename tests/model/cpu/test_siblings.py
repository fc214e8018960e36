import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import qwen2
from mlx_lm.models.cache import make_prompt_cache

from lockstep.model.cpu.rows import FilledLinear
from lockstep.model.cpu.siblings import cpu_siblings
from lockstep.model.cpu.tiles import TiledLinear, whole
from lockstep.model.graph import parameters

TOKENS = mx.array([[3, 1, 4], [1, 5, 9]])


class Attention(nn.Module):
    """Three products of one input, as far as `others` does not have its own."""

    def __init__(self, bias: bool = True, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 48, bias=bias)
        self.k_proj = nn.Linear(8, 16, bias=bias)
        self.v_proj = nn.Linear(width, 32, bias=bias)

    def __call__(self, x: mx.array, others: mx.array | None = None) -> mx.array:
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x if others is None else others)]
        return mx.concatenate(parts, axis=-1)


KINDS = {"MKL": nn.Linear, "Zen": FilledLinear, "SkylakeX": TiledLinear}
"""What multiplies with these kernels."""


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """Of layers by themselves, with each kernels whatever this machine has."""
    monkeypatch.setattr("lockstep.model.cpu.layout.kernels", lambda: request.param)
    return KINDS[request.param]


def with_layers(model, kind):
    for layer in model.children().values():
        layer.__class__ = kind
    return model


def count_products(monkeypatch, kind):
    counted, call = [], kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, x: counted.append(x.shape) or call(self, x))
    return counted


def plain(parameters):
    return {name: whole(array) if array.ndim == 5 else array for name, array in parameters.items()}


@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_one_input_are_one_product_with_the_same_outputs(bias, kind, monkeypatch):
    model, x = with_layers(Attention(bias), kind), mx.random.normal((3, 1, 8))
    wanted, before = model(x), parameters(model)
    mx.eval(wanted, before)
    assert sorted(cpu_siblings(model, parameters(model))) == sorted(before)
    after = plain(parameters(model))
    assert all(mx.array_equal(after[name], before[name]) for name in before | after)
    counted = count_products(monkeypatch, kind)
    for _ in range(2):
        assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    assert len(counted) == 2


def test_a_whole_model_computes_the_same(kind):
    arguments = qwen2.ModelArgs("qwen2", 16, 2, 32, 4, 1e-5, 50, num_key_value_heads=2)
    model = qwen2.Model(arguments)
    wanted = model(TOKENS)
    mx.eval(wanted)
    joined = cpu_siblings(model, parameters(model))
    assert len(joined) == 2 * (6 + 2)
    cache = make_prompt_cache(model)
    first, second = model(TOKENS[:, :1], cache=cache), model(TOKENS[:, 1:], cache=cache)
    assert mx.allclose(mx.concatenate([first, second], axis=1), wanted, rtol=1e-4, atol=1e-5)


def test_weights_are_in_memory_once(kind):
    model = Attention(bias=False)
    model.q_proj.weight = mx.random.normal((64_000, 8))
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    assert cpu_siblings(model, parameters(model))
    mx.eval(model.parameters())
    mx.clear_cache()
    assert mx.get_active_memory() < before + 10_000


def test_layers_that_turn_out_to_have_other_inputs_are_separate_again(kind, monkeypatch):
    model, x, others = with_layers(Attention(), kind), mx.random.normal((3, 8)), mx.random.normal((3, 8))
    wanted = model(x, others)
    mx.eval(wanted)
    assert cpu_siblings(model, parameters(model))
    for _ in range(2):
        assert mx.allclose(model(x, others), wanted, rtol=1e-5, atol=1e-6)
    assert all(type(layer) is kind for layer in model.children().values())
    counted = count_products(monkeypatch, kind)
    model(x)
    assert len(counted) == 3


def test_a_layer_whose_weights_are_asked_for_has_them_and_multiplies_on(kind):
    model, x = with_layers(Attention(), kind), mx.random.normal((3, 8))
    wanted, before = model(x), model.k_proj.weight
    mx.eval(wanted, before)
    assert cpu_siblings(model, parameters(model))
    assert mx.array_equal(model.k_proj.weight, before)
    assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_only_what_is_needed_and_alike_is_joined():
    model = Attention()
    assert cpu_siblings(model, parameters(model).keys() - {"k_proj.bias"}) == []
    model.k_proj = nn.Linear(8, 16, bias=False)
    assert cpu_siblings(model, parameters(model)) == []
    uneven = Attention(width=9)
    assert cpu_siblings(uneven, parameters(uneven)) == []
    model.k_proj = nn.QuantizedLinear(64, 16)
    assert cpu_siblings(model, parameters(model)) == []
