"""Where the weights of a matrix lie in memory, so that a CPU multiplies by it fast."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.blas import AVX2, AVX512, kernels
from lockstep.model.cpu.tiles import Tiled, tile_of, tiled


def cpu_layout(model: nn.Module, head: bool = True) -> None:
    """Lay out the matrices that inputs are multiplied by, those of linear layers and of the head.

    Without `head`, embeddings stay as lookups want them.
    """
    modules = [module for module in model.modules() if module.get("weight") is not None]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    heads = {module.weight.shape for module in linear}
    for module in modules:
        # An embedding without a head of its shape is the head, too.
        if head and isinstance(module, nn.Embedding) and module.weight.shape not in heads:
            linear.append(module)
    for module in linear:
        lay_out(module, [module.weight])


def lay_out(layer: nn.Module, weights: Sequence[mx.array]) -> None:
    """Let `layer` multiply by all these weights [outputs, inputs], which lie as its BLAS does it fastest.

    A linear layer computes `x @ weight.T`. BLAS libraries first copy the weights into the order of their
    kernels, which costs more than multiplying a few rows. OpenBLAS' kernels for AVX2 take 0.6 to 0.9 of the
    time for up to 32 rows when `weight.T` is what lies in memory as rows; `weight` keeps its shape. Those for
    AVX-512 multiply tiles without copying, in a third of the time (`cpu/tiles.py`). For others nothing is
    changed: MKL would take up to 4 times as long for 4 rows.
    """
    cut = tile_of([weight.shape[0] for weight in weights], weights[0].shape[1])
    if kernels() in AVX512 and isinstance(layer, Tiled) and cut:
        layer["weight"] = tiled(weights, *cut)
    elif kernels() in AVX2 and not isinstance(layer, Tiled):
        layer.weight = mx.contiguous(mx.concatenate([weight.T for weight in weights], axis=1)).T
    else:
        layer.weight = weights[0] if len(weights) == 1 else mx.concatenate(list(weights))
