"""Where the weights of a matrix lie in memory, so that a CPU multiplies by it fast."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.blas import kernels


def cpu_layout(model: nn.Module) -> None:
    """Keep the matrices that inputs are multiplied by with one input's weights next to each other.

    A linear layer computes `x @ weight.T`. BLAS libraries first copy the weights into the order of their
    kernels, which costs more than multiplying a few rows; OpenBLAS takes 0.6 to 0.9 of the time for up to 32
    rows when `weight.T` is what lies in memory as rows. MKL takes longer, up to 4 times for 4 rows. The shape
    of `weight` stays as it is.
    """
    if not _by_input():
        return
    modules = [module for module in model.modules() if module.get("weight") is not None]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    heads = {module.weight.shape for module in linear}
    for module in modules:
        # An embedding without a head of its shape is the head, too.
        if isinstance(module, nn.Embedding) and module.weight.shape not in heads:
            linear.append(module)
    for module in linear:
        module.weight = stacked([module.weight])


def stacked(weights: Sequence[mx.array]) -> mx.array:
    """Matrices [outputs, inputs] as one that has all their outputs, in that layout."""
    if not _by_input():
        return mx.concatenate(list(weights))
    return mx.contiguous(mx.concatenate([weight.T for weight in weights], axis=1)).T


def _by_input() -> bool:
    return kernels() != "MKL"
