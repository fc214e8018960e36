"""What one rank keeps of each parameter of a module that is cut by rows or by columns.

A layer's weight is [..., rows out, columns in]. Quantized weights pack `32 / bits` columns into a word and
have one scale (and bias) for each group of columns; cuts by columns respect both, rows are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from lockstep.model.tensor.shares import Range

DENSE = (nn.Linear, SwitchLinear)
QUANTIZED = (nn.QuantizedLinear, QuantizedSwitchLinear)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
PER_HEAD = (MultiLinear, QuantizedMultiLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Piece:
    """Keep these ranges of one axis, which counts from the end (-1 is the last), in this order."""

    axis: int
    ranges: tuple[Range, ...]

    def of(self, whole: mx.array) -> mx.array:
        """This piece of an array, lazily."""
        before = (slice(None),) * (self.axis % whole.ndim)
        parts = [whole[(*before, slice(first, last))] for first, last in self.ranges]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=self.axis)

    @property
    def size(self) -> int:
        return sum(last - first for first, last in self.ranges)


class Dropped:
    """This rank does not hold the parameter at all."""


DROPPED = Dropped()
Cut = Piece | Dropped
"""What happens to one parameter; a parameter without a cut is held whole."""


def is_linear(module: object) -> bool:
    """Whether it is of a class whose parameters we know how to cut; subclasses may have more of them."""
    return type(module) in DENSE + QUANTIZED


def rows_of(module: nn.Module) -> int:
    """Outputs of a linear layer, or entries of an embedding."""
    return int(module.weight.shape[-2])


def columns_of(module: nn.Module) -> int:
    """Inputs of a linear layer."""
    columns: int = module.weight.shape[-1]
    return columns * 32 // module.bits if hasattr(module, "bits") else columns


def group_of(module: nn.Module) -> int:
    """The quantization group along the columns; 1 where the weight is not quantized."""
    return int(getattr(module, "group_size", 1))


def by_rows(module: nn.Module, ranges: Sequence[Range]) -> Iterator[tuple[str, Cut]]:
    """The parameters of `module` that change when it computes only these outputs."""
    kept = tuple(ranges)
    for name in ("weight", "scales", "biases"):
        if module.get(name) is not None:
            yield name, Piece(-2, kept)
    if module.get("bias") is not None:
        yield "bias", Piece(-1, kept)


def by_columns(module: nn.Module, ranges: Sequence[Range], keep_bias: bool) -> Iterator[tuple[str, Cut]]:
    """The parameters that change when `module` sees only these inputs; one rank alone adds the bias."""
    group = group_of(module)
    for name in ("scales", "biases"):
        if module.get(name) is not None:
            yield name, Piece(-1, tuple((first // group, last // group) for first, last in ranges))
    bits = module.bits if group > 1 else 32
    yield "weight", Piece(-1, tuple((first * bits // 32, last * bits // 32) for first, last in ranges))
    if module.get("bias") is not None and not keep_bias:
        yield "bias", DROPPED


def by_heads(module: nn.Module, range_: Range) -> Iterator[tuple[str, Cut]]:
    """One matrix per head: every parameter has the heads in front."""
    for name in ("weight", "scales", "biases"):
        if module.get(name) is not None:
            yield name, Piece(-3, (range_,))
