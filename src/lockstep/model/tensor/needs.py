"""What a rank must have of a checkpoint's tensors: of many no more than its rows, which lie together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lockstep.model import rows
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.headers import TensorInfo
from lockstep.model.rows import Range
from lockstep.model.slices import SliceReader
from lockstep.model.tensor.origins import Origin
from lockstep.model.tensor.pieces import Cut, Dropped, Piece

WORTH_A_REQUEST = 4_000_000
"""Bytes that have to be left out for each piece that is asked for: an address may send the Hub 3000 requests
in five minutes (https://huggingface.co/docs/hub/rate-limits)."""


def needed(
    cuts: Mapping[str, Cut], origins: Mapping[str, Origin], checkpoint: Checkpoint
) -> tuple[set[str], dict[str, set[Range]]]:
    """The tensors that a rank needs whole, and those of which it needs some rows, with these."""
    reader = SliceReader(checkpoint)
    whole, some = set[str](), dict[str, set[Range]]()
    for name, origin in origins.items():
        cut = cuts.get(name)
        if isinstance(cut, Dropped):
            continue
        cut = cut if in_slices(origin, reader) else None
        for tensor in origin.tensors:
            info = checkpoint.tensors[tensor]
            if cut is not None and _worth_cutting(cut, info):
                some.setdefault(tensor, set()).update(rows.along(info.shape, cut.axis, cut.ranges))
            else:
                whole.add(tensor)
    return whole, {tensor: ranges for tensor, ranges in some.items() if tensor not in whole}


def _worth_cutting(cut: Piece, tensor: TensorInfo) -> bool:
    """Whether what is kept of a tensor are rows, which lie together, and the others worth the requests."""
    axis = cut.axis % len(tensor.shape)
    requests = math.prod(tensor.shape[:axis]) * len(cut.ranges)
    spared = tensor.nbytes * (1 - cut.size / tensor.shape[axis])
    in_rows = axis < len(tensor.shape) - 1 and cut.size > 0
    return in_rows and spared > requests * WORTH_A_REQUEST


def in_slices(origin: Origin, reader: SliceReader) -> bool:
    """Whether a slice of a parameter can be made of slices of its tensors."""
    return origin.how != "computed" and all(reader.reads(name) for name in origin.tensors)
