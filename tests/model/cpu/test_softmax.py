import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.model.cpu.softmax import softmax_of_powers


@pytest.mark.parametrize("columns", [64, 4096], ids=["few", "many"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), loud=st.sampled_from([0.01, 1.0, 40.0, 3000.0]), shift=st.floats(-1e4, 1e4))
def test_it_is_the_softmax_of_powers_of_two(columns, seed, loud, shift):
    rng = np.random.default_rng(seed)
    exponents = (loud * rng.standard_normal((4, 4, columns)) + shift).astype(np.float32)
    above, below = (np.array(part, np.float64) for part in softmax_of_powers(mx.array(exponents)))
    wanted = 2.0 ** (exponents.astype(np.float64) - exponents.max(axis=-1, keepdims=True))
    assert np.isfinite(above).all()
    assert np.allclose(above / above.max(axis=-1, keepdims=True), wanted, rtol=2e-6, atol=1e-12)
    assert np.allclose(below, above.sum(axis=-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("columns", [64, 65536], ids=["few", "many"])
def test_what_is_far_below_the_largest_has_no_part(columns):
    exponents = mx.where(mx.arange(columns) < 4, 3.0, -1e30)[None]
    above, below = softmax_of_powers(exponents)
    assert mx.allclose((above / below)[0, :4], mx.full(4, 0.25), rtol=1e-6)
    assert (above / below)[0, 4:].max().item() < 1e-30


def test_a_row_of_which_all_is_as_low_is_even():
    above, below = softmax_of_powers(mx.full((1, 65536), -1e30))
    assert mx.allclose(above / below, mx.full((1, 65536), 2.0**-16), rtol=1e-5)
