import mlx.core as mx
import mlx.nn as nn
import pytest

from lockstep.model.cpu.norms import ShortRMSNorm, cpu_norms


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm


def short(width: int, eps: float = 1e-5) -> nn.Module:
    model = Model(nn.RMSNorm(width, eps))
    cpu_norms(model)
    assert type(model.norm) is ShortRMSNorm
    return model.norm


@pytest.mark.parametrize("shape", [(1, 1, 24), (3, 1, 24), (2, 5, 24), (1, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("size", [1e-4, 1, 1e4])
def test_it_is_the_norm_for_any_shape_and_size(shape: tuple[int, ...], size: float):
    norm, plain = short(24), nn.RMSNorm(24)
    norm.weight = plain.weight = mx.random.normal((24,), key=mx.random.key(1))
    x = size * mx.random.normal(shape, key=mx.random.key(2))
    assert norm(x).shape == x.shape
    assert mx.allclose(norm(x), plain(x), rtol=1e-5, atol=1e-6)


def test_new_weights_and_other_numbers_of_rows_are_seen():
    norm, plain = short(24), nn.RMSNorm(24)
    for rows in (1, 3, 3, 1):
        norm.weight = plain.weight = mx.random.normal((24,))
        x = mx.random.normal((rows, 1, 24))
        assert mx.allclose(norm(x), plain(x), rtol=1e-5, atol=1e-6)


def test_its_only_parameter_is_the_weight():
    norm = short(24)
    norm(mx.ones((1, 1, 24)))
    assert list(norm.parameters()) == ["weight"]


def test_norms_of_other_kinds_stay():
    model = Model(nn.LayerNorm(8))
    cpu_norms(model)
    assert type(model.norm) is nn.LayerNorm
