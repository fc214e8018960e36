from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import LockstepError
from lockstep.model import rows
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.headers import read_header
from lockstep.model.slices import SliceReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    values = mx.random.normal((4, 6, 10))
    tensors = {
        "float32": values,
        "float16": values.astype(mx.float16),
        "bfloat16": values.astype(mx.bfloat16),
        "words": (values * 1000).astype(mx.uint32),
        "bytes": (values * 10).astype(mx.uint8),
        "row": values[0, 0],
        "number": mx.array(3.5),
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder, tensors


def reader(folder):
    return SliceReader(Checkpoint(folder, {}, read_header(folder / "model.safetensors")))


@given(data=st.data(), name=st.sampled_from(["float32", "float16", "bfloat16", "words", "bytes"]))
def test_a_slice_has_the_values_and_type_of_the_whole(folder, data, name):
    path, tensors = folder
    axis = data.draw(st.sampled_from([-1, -2, -3]))
    length = tensors[name].shape[axis]
    ends = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).filter(lambda e: e[0] < e[1])
    ranges = data.draw(st.lists(ends.map(tuple), min_size=1, max_size=3))
    opened = reader(path)
    part = opened.read(name, axis, ranges)
    before = (slice(None),) * (3 + axis)
    expected = mx.concatenate([tensors[name][(*before, slice(*r))] for r in ranges], axis=axis)
    assert part.dtype == expected.dtype
    assert mx.array_equal(part, expected)
    assert opened.bytes_read == part.nbytes


def test_vectors_and_numbers_are_read_too(folder):
    path, tensors = folder
    opened = reader(path)
    assert mx.array_equal(opened.read("row", -1, [(2, 5)]), tensors["row"][2:5])
    assert opened.read("number").item() == 3.5


def test_without_ranges_all_of_it_is_read(folder):
    path, tensors = folder
    opened = reader(path)
    assert mx.array_equal(opened.read("bfloat16"), tensors["bfloat16"])
    assert opened.bytes_read == tensors["bfloat16"].nbytes


def test_what_was_read_does_not_change_with_the_file(folder, tmp_path):
    path, _ = folder
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((path / "model.safetensors").read_bytes())
    part = reader(tmp_path).read("float32")
    before = np.array(part)
    with copy.open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"\xff" * 40)
    assert np.array_equal(np.array(part), before)


def test_a_file_that_became_shorter_is_named(folder, tmp_path):
    path, _ = folder
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((path / "model.safetensors").read_bytes())
    opened = reader(tmp_path)
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size // 2)
    with pytest.raises(LockstepError, match="is truncated"):
        for name in ("float32", "float16", "bfloat16", "words", "bytes"):
            opened.read(name)


def test_types_that_cannot_be_cut_are_known_beforehand(folder):
    opened = reader(folder[0])
    assert opened.reads("bfloat16")
    assert not opened.reads("no such tensor")


@given(data=st.data(), name=st.sampled_from(["float32", "bfloat16"]))
def test_rows_that_were_downloaded_are_read_like_those_of_the_whole(folder, data, name):
    path, tensors = folder
    axis = data.draw(st.sampled_from([-2, -3]))
    length = tensors[name].shape[axis]
    ends = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).filter(lambda e: e[0] < e[1])
    ranges = data.draw(st.lists(ends.map(tuple), min_size=1, max_size=3))
    info = read_header(path / "model.safetensors")[name]
    held = {each: rows.of(info, each) for each in rows.along(info.shape, axis, ranges)}
    absent = {name: replace(info, file="elsewhere")}
    part = SliceReader(Checkpoint(path, {}, absent, {name: held})).read(name, axis, ranges)
    assert mx.array_equal(part, reader(path).read(name, axis, ranges))
