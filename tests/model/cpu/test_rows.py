import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.model.cpu import rows
from lockstep.model.cpu.rows import KERNEL_ROWS, cpu_rows, filled


@given(lengths=st.lists(st.integers(1, 9), max_size=3))
def test_filling_changes_how_many_rows_are_multiplied_and_no_result(lengths):
    x = mx.random.normal((*lengths, 6))
    layer = nn.Linear(6, 5)
    multiplied = []

    def multiply(x):
        multiplied.append(math.prod(x.shape[:-1]))
        return layer(x)

    result = filled(multiply, x)
    count = math.prod(lengths)
    assert result.shape == (*lengths, 5)
    assert mx.allclose(result, layer(x), rtol=1e-5, atol=1e-6)
    along_one_axis = any(length == count for length in lengths)
    to_fill = along_one_axis and -count % KERNEL_ROWS <= count
    assert multiplied == [count + -count % KERNEL_ROWS if to_fill else count]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(24, 8)
        self.layer = nn.Linear(8, 8)

    def __call__(self, tokens):
        return self.embedding.as_linear(self.layer(self.embedding(tokens)))


@pytest.mark.parametrize(("kernels", "changed"), [("Zen", True), ("MKL", False), ("", False)])
def test_layers_and_heads_are_filled_where_the_kernels_of_the_blas_want_it(kernels, changed, monkeypatch):
    monkeypatch.setattr(rows, "kernels", lambda: kernels)
    model, tokens = Model(), mx.array([[3], [1], [23]])
    expected = model(tokens)
    cpu_rows(model)
    assert (type(model.layer) is not nn.Linear) == (type(model.embedding) is not nn.Embedding) == changed
    assert isinstance(model.layer, nn.Linear)
    assert isinstance(model.embedding, nn.Embedding)
    assert mx.allclose(model(tokens), expected, rtol=1e-5, atol=1e-6)
