"""Some rows of a tensor, downloaded without the others: a tensor of their own, whose name tells which.

Rows run along the last axis, and are counted through all matrices of a tensor that stacks some.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lockstep.model.headers import TensorInfo

Range = tuple[int, int]
"""First, and last + 1."""

Rows = Mapping[Range, TensorInfo]

_NAME = re.compile(r"(.+)\[(\d+):(\d+)\]")


def name_of(tensor: str, rows: Range) -> str:
    """What these rows are called in files."""
    return f"{tensor}[{rows[0]}:{rows[1]}]"


def named(name: str) -> tuple[str, Range] | None:
    """The tensor and its rows that are called so; None for a tensor that is whole."""
    match = _NAME.fullmatch(name)
    return (match[1], (int(match[2]), int(match[3]))) if match else None


def along(shape: Sequence[int], axis: int, ranges: Sequence[Range]) -> Iterator[Range]:
    """The rows of a tensor of this shape that have these ranges of an axis, which is not the last."""
    axis %= len(shape)
    within = math.prod(shape[axis + 1 : -1])
    for matrix in range(math.prod(shape[:axis])):
        for first, last in ranges:
            yield (matrix * shape[axis] + first) * within, (matrix * shape[axis] + last) * within


def of(tensor: TensorInfo, rows: Range) -> TensorInfo:
    """Where these rows of `tensor` are."""
    first, last = rows
    row_bytes = tensor.nbytes // math.prod(tensor.shape[:-1])
    shape = (last - first, tensor.shape[-1])
    return replace(tensor, shape=shape, offset=tensor.offset + first * row_bytes, nbytes=shape[0] * row_bytes)


def cover(held: Rows, rows: Range) -> tuple[list[tuple[TensorInfo, Range]], list[Range]]:
    """What of these rows is held, with its place in what holds it, in order; and the rows that are not."""
    at, last = rows
    found, lacking = list[tuple[TensorInfo, Range]](), list[Range]()
    for (start, end), tensor in sorted(held.items(), key=lambda item: item[0]):
        first, stop = max(at, start), min(end, last)
        if first >= stop:
            continue
        if first > at:
            lacking.append((at, first))
        found.append((tensor, (first - start, stop - start)))
        at = stop
    if at < last:
        lacking.append((at, last))
    return found, lacking
