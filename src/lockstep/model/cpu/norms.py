"""RMS norms for CPUs, where mlx makes eleven small operations of each."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.cpu.spread import SpreadWeight, spread


def cpu_norms(model: nn.Module) -> None:
    """Let RMS norms compute the same in six operations where there is one token per row."""
    for module in model.modules():
        if type(module) is nn.RMSNorm:
            module.__class__ = ShortRMSNorm
            module.spread_weight = SpreadWeight()


class ShortRMSNorm(nn.RMSNorm):  # type: ignore[misc]
    """An RMS norm whose squares are summed by a product."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.ndim != 3 or x.shape[1] > 1:
            return super().__call__(x)  # type: ignore[no-any-return]
        rows, _, width = x.shape
        mean = mx.addmm(spread(self.eps, (rows, 1, 1)), x, x.swapaxes(1, 2), alpha=1 / width)
        weight: mx.array = self.spread_weight.over(x, self["weight"])
        return x * mx.rsqrt(mean) * weight
