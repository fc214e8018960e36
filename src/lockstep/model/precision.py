"""What a rank computes in: on CPU float32, elsewhere what the checkpoint has.

mlx's quantized and half-precision kernels for CPUs are slower than a float32 BLAS. So weights become float32
there, too, unless that takes more memory than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten

_HALVES = (mx.float16, mx.bfloat16)


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
    _in_float32(model, set())


def cpu_compact(model: nn.Module) -> None:
    """Turn all parameters into float32, in place and lazily, but the weights of layers that can convert them.

    What it leaves is what `quantized.held_bytes` takes for matrices.
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    matrices = (nn.Linear, nn.Embedding, SwitchLinear)
    _in_float32(
        model, {f"{name}.weight" for name, module in model.named_modules() if type(module) in matrices}
    )


def _in_float32(model: nn.Module, but: Collection[str]) -> None:
    def converted(name: str, parameter: mx.array) -> mx.array:
        return parameter.astype(mx.float32) if parameter.dtype in _HALVES and name not in but else parameter

    model.update(tree_map_with_path(converted, model.parameters()))


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
    dense.weight = dequantized(module, module.weight, module.scales, module.get("biases"))
    if "bias" in module:
        dense.bias = module.bias
    return dense.eval()


def dequantized(
    layer: nn.Module, weight: mx.array, scales: mx.array, biases: mx.array | None = None
) -> mx.array:
    """These weights, which are quantized as those of `layer`, in float32, lazily."""
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        weight,
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )
