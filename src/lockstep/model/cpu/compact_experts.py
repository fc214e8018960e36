"""Experts for CPUs with too little memory for their weights in float32 (`cpu/compact.py`).

mlx multiplies each token by each of its experts alone, quantized or in a copy of all weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from lockstep.model.cpu.blocks import by_blocks
from lockstep.model.cpu.compact import WORTH_A_CORE, arranged, in_float32, parts_of, worth_converting
from lockstep.model.cpu.cores import on_cores
from lockstep.model.cpu.experts import products, with_biases
from lockstep.model.cpu.layers import retype

FEWEST_OUTPUTS = 8
"""Of each expert in a block: for fewer it takes too many operations."""


def cpu_compact_experts(model: nn.Module) -> None:
    """Let experts multiply by few of their weights in float32 at a time."""
    retype(model, {SwitchLinear: CompactExperts, QuantizedSwitchLinear: CompactQuantizedExperts})


class CompactExperts(SwitchLinear):  # type: ignore[misc]
    """Experts with weights in half precision."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        output = _by_blocks(x, [self["weight"]], lambda weight: weight.astype(mx.float32), indices)
        return with_biases(output, self, indices)


class CompactQuantizedExperts(QuantizedSwitchLinear):  # type: ignore[misc]
    """Quantized experts. Few tokens of each are multiplied as mlx does it, by all cores of this rank."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if self.get("global_scale") is not None:
            return super().__call__(x, indices, sorted_indices)  # type: ignore[no-any-return]
        parts = parts_of(self)
        if indices.size * x.shape[-2] < len(parts[0]) * worth_converting(self):
            output = self._as_they_are(x, parts, indices)
        else:
            output = _by_blocks(arranged(x, self), parts, lambda *own: in_float32(self, *own), indices)
        return with_biases(output, self, indices)

    def _as_they_are(self, x: mx.array, parts: Sequence[mx.array], indices: mx.array) -> mx.array:
        weight, scales, *biases = parts
        outputs, (rows, inputs) = weight.shape[1], x.shape[-2:]
        of_x = mx.arange(math.prod(x.shape[:-2]), dtype=mx.uint32).reshape(x.shape[:-2])
        of_x, of_weight = mx.broadcast_to(of_x, indices.shape).reshape(-1), indices.reshape(-1)

        def compute(first: int, last: int) -> mx.array:
            return mx.gather_qmm(
                x.reshape(-1, rows, inputs),
                weight,
                scales,
                biases[0] if biases else None,
                lhs_indices=of_x[first:last],
                rhs_indices=of_weight[first:last],
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )

        worth = indices.size * rows * inputs * outputs // WORTH_A_CORE
        return on_cores(compute, indices.size, worth, 0).reshape(*indices.shape, rows, outputs)


def _by_blocks(
    x: mx.array, parts: Sequence[mx.array], converted: Callable[..., mx.array], indices: mx.array
) -> mx.array:
    """Each of `x` [..., rows, inputs] times the weights of its expert: [*indices, rows, outputs].

    `converted` makes float32 [experts, some outputs, inputs] of `parts` [experts, some outputs, ...].
    """
    experts, outputs = parts[0].shape[:2]
    rows, inputs = x.shape[-2:]
    needed = None
    multiplications = indices.size * rows * outputs * inputs
    if indices.size < experts:
        needed, indices = indices.reshape(-1), mx.arange(indices.size, dtype=mx.uint32).reshape(indices.shape)
        experts = needed.size

    def product(*block: mx.array) -> mx.array:
        own = [part.swapaxes(0, 1) for part in block]
        if needed is not None:
            own = [part[needed] for part in own]
        return products(x, converted(*own).swapaxes(-1, -2), indices)

    def compute(first: int, last: int) -> mx.array:
        own = [part.swapaxes(0, 1)[first:last] for part in parts]
        return by_blocks(product, own, (last - first) * experts * inputs, unit=FEWEST_OUTPUTS)

    return on_cores(compute, outputs, multiplications // WORTH_A_CORE, -1)
