"""Layers for CPUs with too little memory for their weights in float32.

mlx multiplies rows by quantized weights one after the other. More than a few are multiplied by their float32
equivalents here, which are never all there at the same time; with OpenBLAS, a rank's cores share the work.
Layers with weights in half precision do this as tiles do, or matrices where there are none (`cpu/tiles.py`).
"""

from __future__ import annotations

import math
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.cpu.blocks import by_blocks
from lockstep.model.cpu.cores import on_cores
from lockstep.model.cpu.layers import retype
from lockstep.model.cpu.tiles import TiledEmbedding, TiledLinear
from lockstep.model.precision import dequantized

WORTH_CONVERTING = {("affine", 2): 2, ("affine", 4): 2, ("affine", 8): 2, ("mxfp8", 8): 3}
"""Rows from which on it takes mlx longer to multiply by weights of this mode and bits than by float32 made
of them, which it takes 2 ns a number to make of mxfp8, ours 0.6 ns of these affine ones, and mlx 8 to 20 ns
of others: for these it is 16."""

WORTH_A_CORE = 1_000_000
"""Multiplications that repay handing them to another core: 0.9 ms."""


def cpu_compact_layers(model: nn.Module) -> None:
    """Let linear layers, and embeddings that are the head, multiply so."""
    quantized = {nn.QuantizedLinear: CompactLinear, nn.QuantizedEmbedding: CompactEmbedding}
    in_halves = {nn.Linear: TiledLinear, nn.Embedding: TiledEmbedding}
    retype(model, quantized | in_halves)


class CompactLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """A quantized linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        output = _multiplied(x, self)
        return output + self["bias"] if "bias" in self else output


class CompactEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    """A quantized embedding, which looks up float32 in every mode."""

    @property
    def weight(self) -> mx.array:
        """The table in float32, made anew each time, for models that multiply by it themselves."""
        return dequantized(self, *parts_of(self))

    def __call__(self, x: mx.array) -> mx.array:
        return dequantized(self, *(part[x] for part in parts_of(self)))

    def as_linear(self, x: mx.array) -> mx.array:
        """`x` times the table, which makes logits."""
        return _multiplied(x, self)


def parts_of(layer: nn.Module) -> list[mx.array]:
    """The weights, their scales, and the biases of these if there are any: the same axes but for the last."""
    return [layer[name] for name in ("weight", "scales", "biases") if layer.get(name) is not None]


def worth_converting(layer: nn.Module) -> int:
    """Rows from which on it takes less time to multiply by the weights in float32, and make these first."""
    return WORTH_CONVERTING.get((layer.mode, layer.bits), 16)


def arranged(x: mx.array, layer: nn.Module) -> mx.array:
    """`x` [..., inputs] with its inputs in the order of `in_float32`."""
    if not _has_fields(layer):
        return x
    return mx.contiguous(x.reshape(*x.shape[:-1], -1, 8 // layer.bits).swapaxes(-1, -2)).reshape(x.shape)


def in_float32(layer: nn.Module, *parts: mx.array) -> mx.array:
    """Some weights of `layer`, [..., inputs], whose inputs are sorted by their field in a byte.

    For 2, 4 and 8 bits this takes a quarter to a half of the time of mlx's `dequantize`.
    """
    if not _has_fields(layer):
        return dequantized(layer, *parts)
    weight, scales, biases = parts
    masks, factors = _fields(layer.bits)
    fields = (weight.view(mx.uint8)[..., None, :] & masks).astype(mx.float32)
    groups = fields.reshape(*fields.shape[:-1], scales.shape[-1], -1)
    numbers = groups * (scales[..., None, :, None] * factors) + biases[..., None, :, None]
    return numbers.reshape(*weight.shape[:-1], -1)


def _has_fields(layer: nn.Module) -> bool:
    return bool(layer.mode == "affine" and 8 % layer.bits == 0)


@cache
def _fields(bits: int) -> tuple[mx.array, mx.array]:
    """What cuts each field out of a byte, [fields, 1], and what makes a number of it, [fields, 1, 1]."""
    shifts = range(0, 8, bits)
    masks = mx.array([[(1 << bits) - 1 << shift] for shift in shifts], mx.uint8)
    return masks, mx.array([[[1 / (1 << shift)]] for shift in shifts])


def _multiplied(x: mx.array, layer: nn.Module) -> mx.array:
    rows, inputs, parts = math.prod(x.shape[:-1]), x.shape[-1], parts_of(layer)
    converting = rows >= worth_converting(layer)
    x = arranged(x, layer) if converting else x

    def compute(first: int, last: int) -> mx.array:
        own = [part[first:last] for part in parts]
        if converting:
            numbers = (last - first) * inputs
            return by_blocks(lambda *block: x @ in_float32(layer, *block).T, own, numbers)
        weight, scales, *biases = own
        return mx.quantized_matmul(
            x,
            weight,
            scales,
            biases[0] if biases else None,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )

    outputs = len(parts[0])
    return on_cores(compute, outputs, rows * inputs * outputs // WORTH_A_CORE, -1)
