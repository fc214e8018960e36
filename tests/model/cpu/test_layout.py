import mlx.core as mx
import mlx.nn as nn
import pytest

from lockstep.model.cpu import fit_for_cpu, lay_out_for_cpu
from lockstep.model.cpu.layout import cpu_layout
from lockstep.model.precision import computes_on_cpu

FLOAT = 4


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 8)
        self.layers = [nn.Linear(8, 16), nn.Linear(16, 8, bias=False)]
        if not tied:
            self.head = nn.Linear(8, 24, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) if "head" in self else self.embedding.as_linear(x)


def lies_transposed(weight: mx.array) -> bool:
    mx.eval(weight)
    return memoryview(weight).strides == (FLOAT, FLOAT * weight.shape[0])


@pytest.mark.parametrize("kernels", ["Zen", "MKL", ""])
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_lie_as_a_cpu_multiplies_them_and_mean_the_same(tied, kernels, monkeypatch):
    monkeypatch.setattr("lockstep.model.cpu.layout.kernels", lambda: kernels)
    model, tokens = Model(tied), mx.array([[3, 1, 23]])
    before = {name: layer.weight for name, layer in model.named_modules() if "weight" in layer}
    expected = model(tokens)
    mx.eval(before, expected)
    cpu_layout(model)
    for name, layer in model.named_modules():
        if name in before:
            multiplied = tied or name != "embedding"
            assert lies_transposed(layer.weight) == (multiplied and kernels == "Zen"), name
            assert mx.array_equal(layer.weight, before[name])
    assert mx.allclose(model(tokens), expected, rtol=1e-5, atol=1e-6)


def test_where_no_logits_are_made_an_embedding_stays_as_lookups_want_it(monkeypatch):
    monkeypatch.setattr("lockstep.model.cpu.layout.kernels", lambda: "Zen")
    model = Model(tied=True)
    cpu_layout(model, head=False)
    assert not lies_transposed(model.embedding.weight)
    assert lies_transposed(model.layers[0].weight)


def test_a_model_is_changed_only_where_mlx_computes_on_the_cpu(monkeypatch):
    model = Model(tied=True)
    monkeypatch.setattr("lockstep.model.cpu.computes_on_cpu", lambda: False)
    monkeypatch.setattr("lockstep.model.cpu.layout.kernels", lambda: "Zen")
    fit_for_cpu(model)
    assert lay_out_for_cpu(model, set()) == []
    assert not lies_transposed(model.layers[0].weight)


@pytest.mark.skipif(not computes_on_cpu(), reason="mlx computes on a GPU here")
def test_on_a_cpu_halves_become_float32_in_that_layout(monkeypatch):
    for module in ("layout", "tiles"):
        monkeypatch.setattr(f"lockstep.model.cpu.{module}.kernels", lambda: "Haswell")
    model = Model(tied=True)
    model.set_dtype(mx.bfloat16)
    fit_for_cpu(model)
    lay_out_for_cpu(model, set())
    assert model.layers[0].weight.dtype == mx.float32
    assert lies_transposed(model.layers[0].weight)
