"""Headers: what is in a safetensors file, and what is wrong with a broken one."""

import json

import mlx.core as mx
import pytest

from lockstep.errors import UsageError
from lockstep.model.headers import read_header, write_hollow


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": mx.ones((3, 4), mx.float16), "b": mx.arange(5, dtype=mx.uint32), "c": mx.array(1.5)}
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    return path


def written(tmp_path, entries, data=b""):
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_a_header_tells_dtype_shape_and_bytes(weights):
    tensors = read_header(weights)
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in tensors.items()} == {
        "a": ("F16", (3, 4), 24),
        "b": ("U32", (5,), 20),
        "c": ("F32", (), 4),
    }


def test_a_truncated_file_is_refused_with_the_tensor_and_the_numbers(weights):
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=rf"model.safetensors: truncated: .* {len(whole) - 1}: download"):
        read_header(weights)


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_a_file_cut_off_within_its_header_is_refused(weights, kept):
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UsageError, match="cut off within its header"):
        read_header(weights)


def test_bytes_that_do_not_match_the_shape_are_refused(tmp_path):
    path = written(tmp_path, {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, bytes(24))
    with pytest.raises(UsageError, match=r"tensor w is F32 of shape \[2, 3\], 24 bytes, but has 20 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (b"{garbage", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        ({"w": {"dtype": "F99", "shape": [], "data_offsets": [0, 4]}}, "broken header entry"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "broken header entry"),
        ({"w": 3}, "broken header entry"),
        ({"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "has 4 bytes"),
    ],
)
def test_a_garbage_header_is_refused_with_the_file(tmp_path, entries, reason):
    with pytest.raises(UsageError, match=rf"model.safetensors: .*{reason}"):
        read_header(written(tmp_path, entries, bytes(8)))


def test_a_hollow_file_has_the_same_header_and_takes_no_room(weights, tmp_path):
    hollow = tmp_path / "hollow.safetensors"
    write_hollow(hollow, read_header(weights))
    assert {n: (t.shape, t.offset) for n, t in read_header(hollow).items()} == {
        n: (t.shape, t.offset) for n, t in read_header(weights).items()
    }
    assert {name: array.shape for name, array in mx.load(str(hollow)).items()}["a"] == (3, 4)
