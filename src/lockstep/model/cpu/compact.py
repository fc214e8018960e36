"""Layers for CPUs with too little memory for their weights in float32.

mlx multiplies rows by quantized weights one after the other. Where it takes less time to convert these first,
rows are multiplied by their float32 equivalents here, which are never all there at the same time; with
OpenBLAS, a rank's cores share the work.

Layers with weights in half precision do this as tiles do, or matrices where there are none (`cpu/tiles.py`).
"""

from __future__ import annotations

import math
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.cpu.blocks import by_blocks
from lockstep.model.cpu.cores import on_cores
from lockstep.model.cpu.layers import retype
from lockstep.model.cpu.tiles import SLICES, TiledEmbedding, TiledLinear, by_matrix
from lockstep.model.precision import dequantized

WORTH_CONVERTING = {("affine", 2): 1, ("affine", 4): 1, ("affine", 8): 1, ("mxfp8", 8): 3}
"""Rows from which on it takes mlx longer to multiply by weights of this mode and bits, 1 ns a number and row,
than by float32 made of them, which it takes 2 ns a number to make of mxfp8, ours 0.4 ns of these affine ones,
and mlx 8 to 20 ns of others: for these it is 16."""

WORTH_A_CORE = 1_000_000
"""Numbers to convert, or to multiply a row by as they are, that repay another core: 0.6 ms."""

MANY_ROWS = 32
"""That it takes as long to multiply by float32 as to convert it."""


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
    """Some weights of `layer`, [..., inputs], whose inputs are in the order of `arranged`.

    For 2, 4 and 8 bits this takes a quarter to a half of the time of mlx's `dequantize`.
    """
    if not _has_fields(layer):
        return dequantized(layer, *parts)
    weight, scales, biases = parts
    factors = scales[..., None, :, None] * _factors(layer.bits)
    numbers = _fields(_in_groups(weight, layer), layer) * factors + biases[..., None, :, None]
    return numbers.reshape(*weight.shape[:-1], -1)


def _in_groups(weight: mx.array, layer: nn.Module) -> mx.array:
    """The bytes of a weight: [..., 1, groups, bytes of a group]."""
    return weight.view(mx.uint8).reshape(*weight.shape[:-1], 1, -1, layer.group_size * layer.bits // 8)


def _fields(groups: mx.array, layer: nn.Module) -> mx.array:
    """The fields of bytes as they lie in these: [..., fields, groups, bytes of a group]."""
    return (groups & _masks(layer.bits)).astype(mx.float32)


def _has_fields(layer: nn.Module) -> bool:
    return bool(layer.mode == "affine" and 8 % layer.bits == 0)


@cache
def _masks(bits: int) -> mx.array:
    """What cuts each field out of a byte: [fields, 1, 1]."""
    return mx.array([[[(1 << bits) - 1 << shift]] for shift in range(0, 8, bits)], mx.uint8)


@cache
def _factors(bits: int) -> mx.array:
    """What makes the number it holds of what is cut out: [fields, 1, 1]."""
    return mx.array([[[1 / (1 << shift)]] for shift in range(0, 8, bits)])


def _multiplied(x: mx.array, layer: nn.Module) -> mx.array:
    """`x` [..., inputs] times the weights of `layer`: [..., outputs]."""
    rows, inputs, parts = math.prod(x.shape[:-1]), x.shape[-1], parts_of(layer)
    outputs, passes = len(parts[0]), 1 + rows // MANY_ROWS
    if rows < worth_converting(layer):
        product, passes = partial(_by_stored, x, layer), rows
    elif _has_fields(layer):
        product = partial(_by_fields, x, layer)
    else:
        product = partial(_by_converted, x, layer)

    def compute(first: int, last: int) -> mx.array:
        return product(*[part[first * unit : last * unit] for part in parts])

    unit = SLICES[0] if outputs % SLICES[0] == 0 else 1
    return on_cores(compute, outputs // unit, passes * inputs * outputs // WORTH_A_CORE, -1)


def _by_stored(
    x: mx.array, layer: nn.Module, weight: mx.array, scales: mx.array, biases: mx.array | None = None
) -> mx.array:
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.quantized_matmul(x, weight, scales, biases, **settings)


def _by_fields(
    x: mx.array, layer: nn.Module, weight: mx.array, scales: mx.array, biases: mx.array
) -> mx.array:
    """The biases of weights are those of all inputs of a group: they are multiplied by the sums of these."""
    inputs, groups = x.shape[-1], scales.shape[-1]
    sums = x.reshape(*x.shape[:-1], groups, -1).sum(axis=-1)
    factors = _factors(layer.bits)
    x = (arranged(x, layer).reshape(*x.shape[:-1], len(factors), groups, -1) * factors).reshape(x.shape)

    def product(some: mx.array, their_scales: mx.array) -> mx.array:
        return by_matrix(x, (_fields(some, layer) * their_scales).reshape(-1, inputs))

    parts = [_in_groups(weight, layer), scales[:, None, :, None]]
    return by_blocks(product, parts, len(weight) * inputs, SLICES[0]) + sums @ biases.T


def _by_converted(x: mx.array, layer: nn.Module, *parts: mx.array) -> mx.array:
    numbers = len(parts[0]) * x.shape[-1]
    return by_blocks(lambda *block: by_matrix(x, in_float32(layer, *block)), parts, numbers, SLICES[0])
