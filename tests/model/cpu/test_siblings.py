import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import qwen2
from mlx_lm.models.cache import make_prompt_cache

from lockstep.model.cpu.rows import FilledLinear
from lockstep.model.cpu.siblings import cpu_siblings
from lockstep.model.graph import parameters

TOKENS = mx.array([[3, 1, 4], [1, 5, 9]])


class Attention(nn.Module):
    """Three products of one input, as far as `others` does not have its own."""

    def __init__(self, bias: bool = True, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 12, bias=bias)
        self.k_proj = nn.Linear(8, 4, bias=bias)
        self.v_proj = nn.Linear(width, 6, bias=bias)

    def __call__(self, x: mx.array, others: mx.array | None = None) -> mx.array:
        parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x if others is None else others)]
        return mx.concatenate(parts, axis=-1)


def count_products(monkeypatch, kind=nn.Linear):
    counted, call = [], kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, x: counted.append(x.shape) or call(self, x))
    return counted


@pytest.mark.parametrize("kind", [nn.Linear, FilledLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_one_input_are_one_product_with_the_same_outputs(bias, kind, monkeypatch):
    model, x = Attention(bias), mx.random.normal((3, 1, 8))
    for layer in model.children().values():
        layer.__class__ = kind
    wanted, before = model(x), parameters(model)
    mx.eval(wanted, before)
    assert sorted(cpu_siblings(model, parameters(model))) == sorted(before)
    after = parameters(model)
    assert all(mx.array_equal(after[name], before[name]) for name in before | after)
    counted = count_products(monkeypatch, kind)
    for _ in range(2):
        assert mx.allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    assert len(counted) == 2


def test_a_whole_model_computes_the_same():
    arguments = qwen2.ModelArgs("qwen2", 16, 2, 32, 4, 1e-5, 50, num_key_value_heads=2)
    model = qwen2.Model(arguments)
    wanted = model(TOKENS)
    mx.eval(wanted)
    joined = cpu_siblings(model, parameters(model))
    assert len(joined) == 2 * (6 + 2)
    cache = make_prompt_cache(model)
    first, second = model(TOKENS[:, :1], cache=cache), model(TOKENS[:, 1:], cache=cache)
    assert mx.allclose(mx.concatenate([first, second], axis=1), wanted, rtol=1e-4, atol=1e-5)


def test_weights_are_in_memory_once():
    model = Attention(bias=False)
    model.q_proj.weight = mx.random.normal((60_000, 8))
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    assert cpu_siblings(model, parameters(model))
    mx.eval(model.parameters())
    mx.clear_cache()
    assert mx.get_active_memory() < before + 10_000


def test_layers_that_turn_out_to_have_other_inputs_are_separate_again(monkeypatch):
    model, x, others = Attention(), mx.random.normal((3, 8)), mx.random.normal((3, 8))
    wanted = model(x, others)
    mx.eval(wanted)
    assert cpu_siblings(model, parameters(model))
    for _ in range(2):
        assert mx.allclose(model(x, others), wanted, rtol=1e-5, atol=1e-6)
    assert all(type(layer) is nn.Linear for layer in model.children().values())
    counted = count_products(monkeypatch)
    model(x)
    assert len(counted) == 3


def test_only_what_is_needed_and_alike_is_joined():
    model = Attention()
    assert cpu_siblings(model, parameters(model).keys() - {"k_proj.bias"}) == []
    model.k_proj = nn.Linear(8, 4, bias=False)
    assert cpu_siblings(model, parameters(model)) == []
    uneven = Attention(width=9)
    assert cpu_siblings(uneven, parameters(uneven)) == []
    model.k_proj = nn.QuantizedLinear(64, 4)
    assert cpu_siblings(model, parameters(model)) == []
