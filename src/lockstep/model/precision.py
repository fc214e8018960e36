"""What a rank computes in: on CPU float32, elsewhere what the checkpoint has.

mlx's quantized and half-precision kernels for CPUs are slower than a float32 BLAS.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten


def computes_on_cpu() -> bool:
    """Whether mlx's default device is the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def cpu_float32(model: nn.Module) -> None:
    """Turn a model's parameters into float32 in place, lazily; quantized modules become their dense kind.

    Nothing is evaluated: a module that is never used costs no memory. Kinds of quantized modules that are
    not known here stay as they are, which is slow but right.
    """
    named = [(name, _dense(module)) for name, module in model.named_modules()]
    model.update_modules(tree_unflatten([(name, dense) for name, dense in named if dense is not None]))
    halves = (mx.float16, mx.bfloat16)
    model.update(tree_map(lambda p: p.astype(mx.float32) if p.dtype in halves else p, model.parameters()))


def _dense(module: nn.Module) -> nn.Module | None:
    """The dense equivalent of a quantized module with lazy float32 weights; None for any other module."""
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    # The sizes are those of `weight`, which is replaced at once.
    makers: dict[type, Callable[[], nn.Module]] = {
        nn.QuantizedLinear: lambda: nn.Linear(1, 1, bias=False),
        nn.QuantizedEmbedding: lambda: nn.Embedding(1, 1),
        QuantizedSwitchLinear: lambda: SwitchLinear(1, 1, 1, bias=False),
        QuantizedMultiLinear: lambda: MultiLinear(1, 1, 1),
    }
    make = makers.get(type(module))
    if make is None or module.get("global_scale") is not None:
        return None
    dense = make()
    dense.weight = _dequantized(module)
    if "bias" in module:
        dense.bias = module.bias
    return dense.eval()


def _dequantized(module: nn.Module) -> mx.array:
    scales, biases = module.scales, module.get("biases")
    if module.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        module.weight,
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        dtype=mx.float32,
    )
