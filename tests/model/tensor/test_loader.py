"""What loading a slice takes, on one rank of two; the other never answers, as loading meets nobody."""

import json
from typing import Any

import mlx.core as mx

from lockstep.model.checkpoint import inspect
from lockstep.model.tensor.loader import load
from model import tiny
from model.two_ranks import TwoRanks

COLUMNS = 16384


def test_loading_never_holds_more_than_the_slice_and_its_largest_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(mx.distributed, "all_sum", lambda part, group: part)
    monkeypatch.setattr(mx.distributed, "all_gather", lambda part, group: mx.repeat(part, 2, axis=0))
    tiny.save("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": COLUMNS}))
    shapes = {"gate_proj": (COLUMNS, 64), "up_proj": (COLUMNS, 64), "down_proj": (64, COLUMNS)}
    file = str(tmp_path / "model.safetensors")
    tensors: Any = mx.load(file)
    tensors |= {
        f"model.layers.{layer}.mlp.{name}.weight": mx.ones(shape, mx.float16)
        for layer in range(6)
        for name, shape in shapes.items()
    }
    mx.save_safetensors(file, tensors)
    del tensors
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    group: Any = TwoRanks()
    loaded = load(inspect(tmp_path), [1.0, 1.0], group)
    one = COLUMNS // 2 * 64 * 4
    assert loaded.weight_bytes > 6 * 3 * one
    assert abs(mx.get_active_memory() - before - loaded.weight_bytes) < 100_000
    assert mx.get_peak_memory() - before < loaded.weight_bytes + 2 * one
