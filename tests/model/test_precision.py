"""Float32 models that compute what the quantized ones do."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from lockstep.model import precision


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.layers = [nn.Linear(64, 64), nn.Linear(64, 32, bias=False)]
        self.experts = SwitchLinear(64, 32, 4)
        self.heads = MultiLinear(64, 32, 3)
        self.norm = nn.RMSNorm(64)
        self.table = mx.arange(5)

    def __call__(self, tokens):
        h = self.norm(self.layers[0](self.embedding(tokens)))
        experts = self.experts(h[:, None, :], mx.array([[0], [3]]))
        return [
            self.layers[1](h),
            experts,
            self.heads(mx.broadcast_to(h, (1, 3, *h.shape))),
            self.embedding.as_linear(h),
        ]


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4)]
)
def test_a_quantized_model_becomes_a_dense_float32_one_that_computes_the_same(mode, group_size, bits):
    mx.random.seed(0)
    model = Mixed()
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    expected = model(mx.array([3, 7]))
    model.norm.set_dtype(mx.bfloat16)  # its ones lose nothing

    precision.cpu_float32(model)
    kinds = [type(module) for module in model.leaf_modules().values() if isinstance(module, nn.Module)]
    assert not any("Quantized" in kind.__name__ for kind in kinds)
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.float32, mx.int32}
    # mlx dequantizes an mxfp4 embedding to bfloat16, less exactly than here.
    tolerance = 1e-4 if mode == "affine" else 0.02
    for got, wanted in zip(model(mx.array([3, 7])), expected, strict=True):
        assert got.dtype == mx.float32
        assert mx.allclose(got, wanted, atol=tolerance, rtol=tolerance)


def test_becoming_float32_evaluates_nothing(tmp_path):
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    nn.quantize(model, group_size=64, bits=4)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), dict(tree_flatten(model.parameters())))
    model.load_weights(list(mx.load(str(tmp_path / "w.safetensors")).items()))
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    precision.cpu_float32(model)
    assert mx.get_peak_memory() - held < 100_000
    mx.eval(model.layers[0].parameters())
    one = 512 * 512 * 4
    assert one <= mx.get_peak_memory() - held < 2.5 * one
