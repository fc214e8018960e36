"""Reads rows or columns of a tensor from a safetensors file, and nothing else of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lockstep.errors import LockstepError
from lockstep.model import rows
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.headers import LENGTH_BYTES, TensorInfo, tensors_start
from lockstep.model.rows import Range

_TYPES: dict[str, tuple[type[np.generic], mx.Dtype | None]] = {
    "F32": (np.float32, None),
    "F16": (np.float16, None),
    # numpy has no bfloat16: the bits travel as integers.
    "BF16": (np.uint16, mx.bfloat16),
    "U32": (np.uint32, None),
    "I32": (np.int32, None),
    "I64": (np.int64, None),
    "U8": (np.uint8, None),
    "I8": (np.int8, None),
    "U16": (np.uint16, None),
    "BOOL": (np.bool_, None),
}


class SliceReader:
    """The tensors of one checkpoint, by name. `bytes_read` counts what was asked of the files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._local = checkpoint.local
        self._tensors = checkpoint.tensors
        self._rows = checkpoint.rows
        self._starts: dict[Path, int] = {}
        self.bytes_read = 0

    def reads(self, name: str) -> bool:
        """Whether the tensor exists and is of a type that can be read in slices."""
        return name in self._tensors and self._tensors[name].dtype in _TYPES

    def read(self, name: str, axis: int = 0, ranges: Sequence[Range] = ()) -> mx.array:
        """These ranges of the tensor's `axis` (negative: from the end), one after another; all without any.

        Rows are read as one piece; columns as one piece per row. Of a tensor that is not here whole, the rows
        that were downloaded can be read. Raises LockstepError when the file ends before the tensor does.
        """
        info = self._tensors[name]
        kind, bits = _TYPES[info.dtype]
        if ranges and name in self._rows:
            part = self._join_rows(name, axis, ranges, kind)
        else:
            whole = self._map(info, kind)
            before = (slice(None),) * (axis % whole.ndim if ranges else 0)
            parts = [whole[(*before, slice(first, last))] for first, last in ranges] or [whole]
            # Always a copy: the file must not be held open, nor read later.
            part = np.array(parts[0], order="C") if len(parts) == 1 else np.concatenate(parts, axis=axis)
        self.bytes_read += part.nbytes
        array = mx.array(part)
        return array if bits is None else array.view(bits)

    def _join_rows(
        self, name: str, axis: int, ranges: Sequence[Range], kind: type[np.generic]
    ) -> np.ndarray[Any, Any]:
        """Of a tensor that is not here whole."""
        shape, axis = self._tensors[name].shape, axis % len(self._tensors[name].shape)
        parts = list[np.ndarray[Any, Any]]()
        for each in rows.along(shape, axis, ranges):
            found, lacking = rows.cover(self._rows[name], each)
            assert not lacking, f"rows {lacking} of {name} were not downloaded"
            parts += [self._map(held, kind)[first:last] for held, (first, last) in found]
        kept = sum(last - first for first, last in ranges)
        return np.concatenate(parts).reshape(*shape[:axis], kept, *shape[axis + 1 :])

    def _map(self, info: TensorInfo, kind: type[np.generic]) -> np.ndarray[Any, Any]:
        path = self._local(info.file)
        offset = self._start(path) + info.offset
        if path.stat().st_size < offset + info.nbytes:
            raise LockstepError(f"{path} is truncated: fetch the file again")
        flat = np.memmap(path, dtype=kind, mode="r", offset=offset, shape=(math.prod(info.shape),))
        return np.asarray(flat).reshape(info.shape)

    def _start(self, path: Path) -> int:
        if path not in self._starts:
            with path.open("rb") as opened:
                self._starts[path] = tensors_start(opened.read(LENGTH_BYTES))
        return self._starts[path]
