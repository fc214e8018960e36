"""What checkpoints quantized by others take, against what mlx-lm makes of files that hold only a header."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from lockstep.model import checkpoint
from lockstep.model.cpu import fit_for_cpu
from lockstep.model.graph import parameters
from lockstep.model.headers import TensorInfo, read_header, write_hollow
from lockstep.model.loader import open_model

BITS = {"F32": 32, "I32": 32, "BF16": 16, "U8": 8, "F8_E4M3": 8}
CUT = re.compile(r"self_attn\.[kvo]_proj\.weight|\.mlp\.(gate|up|down)_proj\.weight")


def mxfp4(stem, shape):
    """gpt-oss: gate and up of all experts in one tensor, 32 numbers in 16 bytes."""
    *outer, rows, columns = shape
    if stem.endswith("up_proj"):
        return {}
    stem, rows = (stem.replace("gate_proj", "gate_up_proj"), 2 * rows) if "gate" in stem else (stem, rows)
    groups = columns // 32
    return {
        f"{stem}_blocks": ("U8", (*outer, rows, groups, 16)),
        f"{stem}_scales": ("U8", (*outer, rows, groups)),
    }


def fp8(stem, shape):
    blocks = tuple(-(-side // 128) for side in shape)
    return {f"{stem}.weight": ("F8_E4M3", shape), f"{stem}.weight_scale_inv": ("F32", blocks)}


def mxfp8(stem, shape):
    rows, columns = shape
    return {f"{stem}.weight": ("F8_E4M3", shape), f"{stem}.weight_scale_inv": ("U8", (rows, columns // 32))}


def awq(stem, shape):
    rows, columns = shape
    return {
        f"{stem}.qweight": ("I32", (columns, rows // 8)),
        f"{stem}.qzeros": ("I32", (columns // 32, rows // 8)),
        f"{stem}.scales": ("BF16", (columns // 32, rows)),
    }


def packed(stem, shape):
    rows, columns = shape
    return {
        f"{stem}.weight_packed": ("I32", (rows, columns // 8)),
        f"{stem}.weight_scale": ("BF16", (rows, columns // 32)),
        f"{stem}.weight_shape": ("I32", (2,)),
    }


FORMATS = {
    "mxfp4": ("gpt_oss", mxfp4, {}, re.compile(r"experts\.\w+_proj\.weight")),
    "fp8": ("deepseek_v3", fp8, {}, CUT),
    "mxfp8": ("minimax_m3_vl", mxfp8, {}, CUT),
    "awq": ("llama", awq, {"bits": 4, "group_size": 32}, CUT),
    "compressed-tensors": ("deepseek_v3", packed, {"format": "pack-quantized"}, CUT),
}


def save(method, folder):
    """A checkpoint in BF16 of which some weights are quantized by `method`; its tensors are holes."""
    architecture, quantized, settings, cut = FORMATS[method]
    tiny.save(architecture, folder)
    shapes = {}
    for name, tensor in read_header(folder / "model.safetensors").items():
        if cut.search(name):
            shapes |= quantized(name.removesuffix(".weight"), tensor.shape)
        else:
            shapes[name] = ("BF16", tensor.shape)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method} | settings
    (folder / "config.json").write_text(json.dumps(config))
    tensors, end = {}, 0
    for name, (kind, shape) in _as_stored(shapes).items():
        nbytes = math.prod(shape) * BITS[kind] // 8
        tensors[name] = TensorInfo("model.safetensors", kind, tuple(shape), end, nbytes)
        end += nbytes
    write_hollow(folder / "model.safetensors", tensors)


def _as_stored(shapes):
    """gpt-oss keeps the biases of gate and up together as well."""
    if not any("_blocks" in name for name in shapes):
        return shapes
    stored = {}
    for name, (kind, shape) in shapes.items():
        if name.endswith("experts.gate_proj.bias"):
            stored[name.replace("gate_proj.bias", "gate_up_proj_bias")] = kind, (*shape[:-1], 2 * shape[-1])
        elif not name.endswith("experts.up_proj.bias"):
            stored[name.replace("down_proj.bias", "down_proj_bias")] = kind, shape
    return stored


@pytest.mark.parametrize("method", FORMATS)
def test_quantized_weights_take_what_mlx_lm_makes_of_them(method, tmp_path):
    save(method, tmp_path)
    seen = checkpoint.inspect(tmp_path)
    model, _, _ = open_model(tmp_path)

    def held():
        return [sum(a.nbytes for a in parameters(layer).values()) for layer in model.layers]

    stored = checkpoint.costs(seen, held="stored")
    assert list(stored.layer_bytes) == held()
    compact, _, _ = open_model(tmp_path)
    fit_for_cpu(compact, compact=True)
    planned, real = (
        checkpoint.costs(seen, held="compact").total_bytes,
        sum(a.nbytes for a in parameters(compact).values()),
    )
    assert real <= planned <= 1.01 * real  # Some routers are matrices as others.
    fit_for_cpu(model)
    dense = checkpoint.costs(seen, held="float32")
    assert list(dense.layer_bytes) == held()
    assert dense.total_bytes == sum(a.nbytes for a in parameters(model).values())
    assert dense.kv_bytes_per_token == tuple(2 * kv for kv in stored.kv_bytes_per_token)
    assert all(stored.kv_bytes_per_token)
