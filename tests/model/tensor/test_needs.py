from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.model.checkpoint import Checkpoint
from lockstep.model.headers import TensorInfo
from lockstep.model.tensor.needs import needed
from lockstep.model.tensor.origins import Origin
from lockstep.model.tensor.pieces import DROPPED, Cut, Piece

MATRIX = (4000, 1000)
STACK = (2, 4000, 1000)


def needs_of(cut: Cut | None, origin: Origin, shape: tuple[int, ...], dtype: str = "F32"):
    size = 1
    for side in shape:
        size *= side
    tensors = {name: TensorInfo("model.safetensors", dtype, shape, 0, 4 * size) for name in origin.tensors}
    cuts = {} if cut is None else {"p": cut}
    return needed(cuts, {"p": origin}, Checkpoint(Path(), {}, tensors))


@pytest.mark.parametrize(
    ("cut", "shape", "some"),
    [
        (Piece(-2, ((500, 1500),)), MATRIX, {(500, 1500)}),
        (Piece(-2, ((0, 500), (1000, 1200))), MATRIX, {(0, 500), (1000, 1200)}),
        (Piece(-2, ((0, 1000),)), STACK, {(0, 1000), (4000, 5000)}),
        (Piece(-3, ((1, 2),)), STACK, {(4000, 8000)}),
    ],
)
def test_of_what_is_cut_by_rows_these_are_needed(cut, shape, some):
    assert needs_of(cut, Origin(("a",)), shape) == (set(), {"a": some})


def test_every_tensor_of_a_stack_is_cut():
    cut = Piece(-2, ((0, 1000),))
    assert needs_of(cut, Origin(("a", "b"), "stacked"), MATRIX) == (
        set(),
        {"a": {(0, 1000)}, "b": {(0, 1000)}},
    )


@pytest.mark.parametrize(
    ("cut", "how", "shape", "dtype"),
    [
        (None, "same", MATRIX, "F32"),
        (Piece(-1, ((0, 500),)), "same", MATRIX, "F32"),
        (Piece(-2, ((0, 0),)), "same", MATRIX, "F32"),
        (Piece(-1, ((0, 1_000_000),)), "same", (4_000_000,), "F32"),
        (Piece(-2, ((0, 1000),)), "computed", MATRIX, "F32"),
        (Piece(-2, ((0, 1000),)), "same", MATRIX, "F8_E4M3"),
        (Piece(-2, ((0, 3900),)), "same", MATRIX, "F32"),
        (Piece(-2, ((0, 1000),)), "same", (2, 1900, 1000), "F32"),
    ],
    ids=[
        "not cut",
        "columns",
        "none of it",
        "a vector",
        "computed",
        "of 8 bits",
        "most of it",
        "many small pieces",
    ],
)
def test_the_rest_is_needed_whole(cut, how, shape, dtype):
    assert needs_of(cut, Origin(("a",), how), shape, dtype) == ({"a"}, {})


def test_what_is_needed_whole_for_one_parameter_is_not_cut_for_another():
    tensor = TensorInfo("model.safetensors", "F32", MATRIX, 0, 16_000_000)
    found = needed(
        {"p": Piece(-2, ((0, 1000),))},
        {"p": Origin(("a",)), "q": Origin(("a",))},
        Checkpoint(Path(), {}, {"a": tensor}),
    )
    assert found == ({"a"}, {})


def test_what_a_rank_drops_is_not_needed():
    assert needs_of(DROPPED, Origin(("a",)), MATRIX) == (set(), {})
