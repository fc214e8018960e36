import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE

from lockstep.model.cpu.rope import cpu_rope

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "halves": lambda: nn.RoPE(16),
    "neighbours": lambda: nn.RoPE(16, traditional=True),
    "other base and scale": lambda: nn.RoPE(16, base=5e5, scale=0.25),
    "part of a head": lambda: nn.RoPE(8),
    "too wide for matrices": lambda: nn.RoPE(160, scale=0.01),
    "llama 3": lambda: Llama3RoPE(16, base=5e5, scaling_config=SCALING),
}


class Layers(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layers = [make(), make()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5])
def test_it_rotates_like_mlx_at_every_offset_and_in_every_layer(kind, length):
    plain, cheap = Layers(KINDS[kind]), Layers(KINDS[kind])
    cpu_rope(cheap)
    mx.random.seed(0)
    for offset in (0, 1, 1000, mx.array([3, 70]), mx.array([4, 71])):
        x = mx.random.normal((2, 3, length, 160 if "wide" in kind else 16))
        for theirs, ours in zip(plain.layers, cheap.layers, strict=True):
            assert mx.allclose(ours(x, offset=offset), theirs(x, offset=offset), rtol=1e-4, atol=1e-4)


def test_an_offset_that_a_cache_changes_in_place_is_seen():
    plain, cheap = Layers(KINDS["halves"]), Layers(KINDS["halves"])
    cpu_rope(cheap)
    offset, x = mx.array([3, 4]), mx.random.normal((2, 3, 1, 16))
    for _ in range(3):
        wanted = plain.layers[0](x, offset=mx.array(offset))
        assert mx.allclose(cheap.layers[0](x, offset=offset), wanted, rtol=1e-4, atol=1e-4)
        offset += 1


def test_half_precision_stays_half_precision():
    cheap = Layers(KINDS["halves"])
    cpu_rope(cheap)
    assert cheap.layers[0](mx.ones((1, 1, 1, 16), mx.bfloat16), offset=3).dtype == mx.bfloat16


def test_two_parts_of_a_model_with_different_angles_do_not_share_tables():
    plain = Layers(lambda: None)
    plain.layers = [nn.RoPE(16), nn.RoPE(16, base=100)]
    x = mx.random.normal((1, 1, 4, 16))
    wanted = [layer(x, offset=9) for layer in plain.layers]
    cpu_rope(plain)
    for layer, result in zip(plain.layers, wanted, strict=True):
        assert mx.allclose(layer(x, offset=9), result, rtol=1e-4, atol=1e-4)
