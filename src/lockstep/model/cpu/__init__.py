"""What a model needs to run fast on a CPU, for which mlx has few kernels. One call for every loader."""

from __future__ import annotations

import mlx.nn as nn

from lockstep.model.cpu.functions import cpu_functions
from lockstep.model.cpu.layout import cpu_layout
from lockstep.model.cpu.rope import cpu_rope
from lockstep.model.cpu.rows import cpu_rows
from lockstep.model.precision import computes_on_cpu, cpu_float32


def fit_for_cpu(model: nn.Module) -> None:
    """Change the model in place, lazily, where mlx computes on the CPU: it computes the same, faster."""
    if computes_on_cpu():
        cpu_float32(model)
        cpu_layout(model)
        cpu_rows(model)
        cpu_rope(model)
        cpu_functions(model)
