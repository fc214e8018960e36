"""The headers of safetensors files: what is in a file and where, without reading any weights.

A file is eight bytes (little-endian length of the header), the header (JSON), and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import UsageError

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
LENGTH_BYTES = 8
"""In front of the header."""

_LONGEST_HEADER_BYTES = 100_000_000
AGAIN = "download or convert it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `dtype` is the safetensors name (BF16, U32, ...), `offset` counts from the header's end."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a local file. Raises UsageError, naming the tensor, if their bytes cannot be there."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(path.name, file.read(LENGTH_BYTES), file_bytes)
            return _parse(path.name, file.read(length), file_bytes)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}): {AGAIN}") from error


def tensors_start(first_bytes: bytes) -> int:
    """The byte at which the tensors of a file begin whose first LENGTH_BYTES are these."""
    return LENGTH_BYTES + int.from_bytes(first_bytes, "little")


def write_hollow(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """A file with this header and the right size, whose tensors take no room on the disk: they are holes."""
    first = header(tensors)
    with path.open("wb") as file:
        file.write(first)
        file.truncate(len(first) + max(t.offset + t.nbytes for t in tensors.values()))


def header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """How a file begins that has these tensors, before their bytes."""
    entries = {
        name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.offset, t.offset + t.nbytes]}
        for name, t in tensors.items()
    }
    text = json.dumps(entries).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _header_length(file: str, first_bytes: bytes, file_bytes: int) -> int:
    length = tensors_start(first_bytes) - LENGTH_BYTES
    longest = min(_LONGEST_HEADER_BYTES, file_bytes - LENGTH_BYTES)
    if len(first_bytes) < LENGTH_BYTES or not 2 <= length <= longest:
        raise UsageError(f"{file}: not a safetensors file, or cut off within its header: {AGAIN}")
    return length


def _parse(file: str, header: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header)
    except ValueError as error:
        raise UsageError(f"{file}: its header is not JSON: {AGAIN}") from error
    if not isinstance(entries, dict):
        raise UsageError(f"{file}: its header is not a JSON object: {AGAIN}")
    tensors = {name: _tensor(file, name, entry) for name, entry in entries.items() if name != "__metadata__"}
    for name, tensor in tensors.items():
        end = LENGTH_BYTES + len(header) + tensor.offset + tensor.nbytes
        if end > file_bytes:
            raise UsageError(
                f"{file}: truncated: tensor {name} ends at byte {end}, the file has {file_bytes}: {AGAIN}"
            )
    return tensors


def _tensor(file: str, name: str, entry: Any) -> TensorInfo:
    try:
        dtype = str(entry["dtype"])
        shape = tuple(int(side) for side in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        bits = _BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: tensor {name} has a broken header entry ({error!r}): {AGAIN}") from error
    wanted = (math.prod(shape) * bits + 7) // 8
    if begin < 0 or min(shape, default=0) < 0 or end - begin != wanted:
        raise UsageError(
            f"{file}: tensor {name} is {dtype} of shape {list(shape)}, {wanted} bytes, but has "
            f"{end - begin} bytes: {AGAIN}"
        )
    return TensorInfo(file, dtype, shape, begin, wanted)
