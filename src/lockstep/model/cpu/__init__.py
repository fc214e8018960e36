"""What a model needs to run fast on a CPU, for which mlx has few kernels. Three calls for every loader."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.blas import AVX512, kernels
from lockstep.model.cpu.compact import cpu_compact_layers
from lockstep.model.cpu.compact_experts import cpu_compact_experts
from lockstep.model.cpu.cores import take_cores
from lockstep.model.cpu.experts import cpu_experts, lay_out_experts
from lockstep.model.cpu.functions import cpu_functions
from lockstep.model.cpu.layout import cpu_layout
from lockstep.model.cpu.norms import cpu_norms
from lockstep.model.cpu.pages import move_to_large_pages
from lockstep.model.cpu.rope import cpu_rope
from lockstep.model.cpu.rows import cpu_rows
from lockstep.model.cpu.siblings import cpu_siblings
from lockstep.model.cpu.tiles import cpu_tiles
from lockstep.model.precision import computes_on_cpu, cpu_compact, cpu_float32


def fit_for_cpu(model: nn.Module, compact: bool = False) -> None:
    """Change the model in place, lazily, where mlx computes on the CPU: it computes the same, faster.

    Its weights become float32, which is fastest, or stay as they are, `compact`.
    """
    if not computes_on_cpu():
        return
    if compact:
        cpu_compact(model)
        cpu_compact_layers(model)
        cpu_compact_experts(model)
    else:
        cpu_float32(model)
        cpu_rows(model)
        cpu_tiles(model)
        cpu_experts(model)
    # Elsewhere OpenBLAS shares out products in float32 well itself.
    if compact or kernels() in AVX512:
        take_cores()
    cpu_norms(model)
    cpu_rope(model)
    cpu_functions(model)


def lay_out_for_cpu(model: nn.Module, needed: Collection[str], head: bool = True) -> list[str]:
    """Then change, lazily too, where its weights lie in memory, of which these parameters are `needed` here.

    `head` is False where no logits are made. Returns those that had better be evaluated first: until they
    are, they take the most memory.
    """
    if not computes_on_cpu():
        return []
    joined = cpu_siblings(model, needed)
    cpu_layout(model, head)
    lay_out_experts(model)
    return joined


def settle_for_cpu(weight: mx.array) -> None:
    """Last, once it is evaluated: let it stay where the CPU reads it fastest."""
    if computes_on_cpu():
        move_to_large_pages(weight)
