"""What a stored tensor takes once mlx-lm has loaded it, in mlx's formats and those that it converts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from lockstep.errors import UsageError
from lockstep.model.headers import TensorInfo

Config = Mapping[str, Any]
Tensors = Mapping[str, TensorInfo]

Held = Literal["stored", "float32", "compact"]
"""In what form a rank holds a model: as stored, which is for GPUs; in float32, as CPUs compute fastest; or
compact, for CPUs with too little memory for that: matrices as stored, scales and all else in float32."""

_SCALED_BY = (
    (".weight", (".scales", ".biases")),  # mlx
    ("_blocks", ("_scales",)),  # mxfp4 of gpt-oss
    ("", ("_scale_inv",)),  # fp8
    (".weight", (".scale",)),  # mxfp8 and fp4 of DeepSeek
    (".qweight", (".scales", ".qzeros")),  # AWQ and GPTQ
    (".weight_packed", (".weight_scale", ".weight_shape")),  # compressed-tensors
)
"""How the names of quantized weights end, and those of what scales them."""
_HALVES = ("F16", "BF16")
_FLOATS = ("F64", "F32", *_HALVES)
_MATRIX = re.compile(
    r"(?!.*(norm|conv\w*|\.gate|\.kv_b_proj|\.embed_q|\.unembed_out)\.weight$)"
    r".*(\.weight|experts\.(gate_up|down)_proj)"
)
"""Weights that `precision.cpu_compact` leaves as they are, if they have two dimensions or more. Routers and
latent attention are matrices, too, but of layers that it turns into float32."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_PACKED = ("U32", "I32", "U8", "I8", *_FP8)
_MICROSCALES = ("U8", "F8_E8M0")
"""Powers of two: mlx computes with weights scaled by them, others in FP8 become bfloat16."""


def held_bytes(config: Config, tensors: Tensors, name: str, held: Held) -> int:
    """Bytes of a tensor once it is loaded; scales vanish when their weight is dequantized."""
    if held == "float32":
        return _dense_bytes(config, tensors, name)
    stored, tensor = _stored_bytes(config, tensors, name), tensors[name]
    if held == "stored":
        return stored
    if _scaled_weight(tensors, name):
        return 2 * stored if tensor.dtype in _HALVES else stored
    stays_quantized = tensor.dtype in _PACKED and tensor.dtype not in _FP8
    is_matrix = len(tensor.shape) > 1 and _MATRIX.fullmatch(name)
    return stored if stays_quantized or is_matrix else _dense_bytes(config, tensors, name)


def _dense_bytes(config: Config, tensors: Tensors, name: str) -> int:
    tensor = tensors[name]
    if _scaled_weight(tensors, name):
        return 0
    in_floats = _scales(tensors, name) or tensor.dtype in _FLOATS
    return 4 * _values(config, tensors, name) if in_floats else tensor.nbytes


def _stored_bytes(config: Config, tensors: Tensors, name: str) -> int:
    tensor = tensors[name]
    if weight := _scaled_weight(tensors, name):
        kind = tensors[weight].dtype
        if kind in _FP8 and tensor.dtype not in _MICROSCALES:
            return 0
        if kind in (*_FP8, "I8"):
            return _values(config, tensors, weight) // 32  # stored once for 32 rows, held for each
        if kind == "I32":  # mlx holds a bias for each scale, instead of the zeros
            return 2 * tensor.nbytes if tensor.dtype in _FLOATS else 0
        return tensor.nbytes
    scales = _scales(tensors, name)
    if scales and tensor.dtype in _FP8 and tensors[scales].dtype not in _MICROSCALES:
        return 2 * tensor.size
    return tensor.nbytes


def _scaled_weight(tensors: Tensors, name: str) -> str | None:
    """The quantized weight that this tensor scales; None if it is no scale."""
    for weight, scales in _SCALED_BY:
        for end in scales:
            scaled = name.removesuffix(end) + weight
            if name.endswith(end) and scaled in tensors and tensors[scaled].dtype in _PACKED:
                return scaled
    return None


def _scales(tensors: Tensors, name: str) -> str | None:
    """What scales this tensor; None if it is not quantized."""
    if tensors[name].dtype not in _PACKED:
        return None
    found = (name.removesuffix(end) + scales[0] for end, scales in _SCALED_BY if name.endswith(end))
    return next((scales for scales in found if scales in tensors), None)


def _values(config: Config, tensors: Tensors, name: str) -> int:
    """Numbers in a tensor, quantized or not."""
    tensor, scales = tensors[name], _scales(tensors, name)
    if scales is None or tensor.dtype in _FP8:
        return tensor.size
    if tensor.dtype != "U32":
        return 2 * tensor.nbytes  # these formats have 4 bits
    groups = tensors[scales]
    if groups.dtype in _MICROSCALES:
        return groups.size * (16 if tensor.nbytes == 8 * groups.size else 32)  # nvfp4, else mxfp4 or mxfp8
    return groups.size * _group_size(config, name.removesuffix(".weight"))


def _group_size(config: Config, module: str) -> int:
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    own = quantization.get(module)
    size = (own if isinstance(own, dict) else quantization).get("group_size", quantization.get("group_size"))
    if not isinstance(size, int):
        raise UsageError(
            f"config.json has no quantization group_size, but {module} is quantized: convert it again"
        )
    return size
