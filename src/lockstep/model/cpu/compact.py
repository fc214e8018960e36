"""Quantized layers for CPUs with too little memory for their weights in float32.

mlx multiplies rows by quantized weights one after the other. More than a few are multiplied by their float32
equivalents here, which are never all there at the same time; and a rank's cores share the work.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.cpu.blocks import by_blocks
from lockstep.model.cpu.cores import on_cores
from lockstep.model.cpu.layers import retype
from lockstep.model.precision import dequantized

WORTH_CONVERTING = {("affine", 2): 4, ("affine", 4): 4, ("affine", 8): 3, ("mxfp8", 8): 3}
"""Rows from which on it takes mlx longer to multiply than to dequantize, by mode and bits; of others 16."""

WORTH_A_CORE = 1_000_000
"""Multiplications that repay handing them to another core: 0.9 ms."""


def cpu_compact_layers(model: nn.Module) -> None:
    """Let quantized layers, and embeddings that are the head, multiply so."""
    retype(model, {nn.QuantizedLinear: CompactLinear, nn.QuantizedEmbedding: CompactEmbedding})


class CompactLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """A quantized linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        output = _multiplied(x, self)
        return output + self["bias"] if "bias" in self else output


class CompactEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    """A quantized embedding, which looks up float32 in every mode."""

    def __call__(self, x: mx.array) -> mx.array:
        return dequantized(self, *(part[x] for part in _parts(self)))

    def as_linear(self, x: mx.array) -> mx.array:
        """`x` times the table, which makes logits."""
        return _multiplied(x, self)


def _parts(layer: nn.Module) -> list[mx.array]:
    """The weights, their scales, and the biases of these if there are any: an output in each row."""
    return [layer[name] for name in ("weight", "scales", "biases") if layer.get(name) is not None]


def _multiplied(x: mx.array, layer: nn.Module) -> mx.array:
    rows, inputs, parts = math.prod(x.shape[:-1]), x.shape[-1], _parts(layer)
    outputs = len(parts[0])

    def by_float32(*block: mx.array) -> mx.array:
        return x @ dequantized(layer, *block).T

    def compute(first: int, last: int) -> mx.array:
        own = [part[first:last] for part in parts]
        if rows >= WORTH_CONVERTING.get((layer.mode, layer.bits), 16):
            return by_blocks(by_float32, own, (last - first) * inputs)
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

    return on_cores(compute, outputs, rows * inputs * outputs // WORTH_A_CORE, -1)
