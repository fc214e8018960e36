"""What loading a slice takes, on one rank of several; the others never answer, as loading meets nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from lockstep.model.checkpoint import inspect
from lockstep.model.tensor.loader import load
from model import fake_hub, tiny
from model.two_ranks import TwoRanks

ROOT = Path(__file__).parents[3]
COLUMNS = 16384

RANKS = """
import json, sys
from pathlib import Path
import mlx.core as mx
from lockstep.model import checkpoint, hub
from lockstep.model.graph import parameters
from lockstep.model.tensor import loader, needs

class Group:
    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size

mx.distributed.all_sum = lambda part, group: part
mx.distributed.all_gather = lambda part, group: mx.concatenate([part] * group.size())
needs.WORTH_A_REQUEST = 0

def held(path, rank, weights):
    loaded = loader.load(checkpoint.inspect(path), weights, Group(rank, len(weights)))
    return loaded, parameters(loaded.shard._model)

sent = 0

def read(*arguments, read=hub.read):
    global sent
    data = read(*arguments)
    sent += len(data)
    return data

hub.read = read
path, source = checkpoint.resolve("org/tiny"), Path(sys.argv[1])
for rank, weights in json.loads(sys.argv[2]):
    before = sent
    loaded, own = held(path, rank, weights)
    _, expected = held(source, rank, weights)
    assert own.keys() == expected.keys()
    assert all(mx.array_equal(own[name], array) for name, array in expected.items())
    print(json.dumps([loaded.bytes_read, sent - before]))
"""


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


Ranks = list[tuple[int, list[int]]]
"""Each rank, and the weights of all."""


def load_from_hub(source: Path, ranks: Ranks) -> list[list[int]]:
    """What each rank read, and what it downloaded for that; its parameters are those of `source`."""
    with fake_hub.serve("org/tiny", source) as hub:
        done = hub.run(source.parent, RANKS, source, json.dumps(ranks))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_columns(file: Path) -> int:
    """Bytes of matrices that are cut so: what a rank has of them lies apart in the file."""
    matrices: Any = mx.load(str(file))
    return sum(array.nbytes for name, array in matrices.items() if "o_proj" in name or "down_proj" in name)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_of_matrices_that_are_cut_by_rows_a_rank_downloads_only_its_own(tmp_path, kind):
    source = tmp_path / "source"
    tiny.save(kind, source)
    first, again, within, other = load_from_hub(source, [(0, [2, 1]), (0, [2, 1]), (0, [1, 1]), (1, [1, 1])])
    read, sent = first
    # 8 bytes say how long the file's header is.
    assert read < sent <= read + by_columns(source / "model.safetensors") / 2 + 8
    assert again == [read, 0]
    assert within[1] == 0, "what is here of another split is not downloaded again"
    assert 0 < other[1] < other[0], "nor are the columns"


def test_what_a_parameter_is_computed_from_is_downloaded_whole(tmp_path):
    source = tmp_path / "source"
    tiny.save("deepseek_v3", source)
    file = source / "model.safetensors"
    tensors: Any = mx.load(str(file))
    # As DeepSeek publishes them: one matrix, of which mlx-lm makes two.
    for name in [name for name in tensors if name.endswith("embed_q.weight")]:
        attention = name.removesuffix("embed_q.weight")
        parts = [tensors.pop(name).swapaxes(-1, -2), tensors.pop(f"{attention}unembed_out.weight")]
        joined = mx.concatenate(parts, axis=1)
        tensors[f"{attention}kv_b_proj.weight"] = joined.reshape(-1, joined.shape[-1])
    mx.save_safetensors(str(file), tensors)
    [(_, sent)] = load_from_hub(source, [(1, [1, 1])])
    made_from = sum(array.nbytes for name, array in tensors.items() if "kv_b_proj" in name)
    assert made_from < sent < file.stat().st_size


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_what_mlx_lm_converts_is_downloaded_whole_too(tmp_path, kind):
    source = tmp_path / "source"
    tiny.save(kind, source)
    as_awq(source)
    [(_, sent)] = load_from_hub(source, [(1, [1, 1])])
    assert 0 < sent < (source / "model.safetensors").stat().st_size


def as_awq(folder: Path) -> None:
    """Replace the matrices by some as AWQ writes them, which mlx-lm turns into its own."""
    file, group = folder / "model.safetensors", 32
    tensors: Any = mx.load(str(file))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer, (outputs, inputs) = name.removesuffix(".weight"), tensors.pop(name).shape
        groups = inputs // group
        tensors[f"{layer}.qweight"] = mx.random.randint(0, 2**31 - 1, (inputs, outputs // 8))
        tensors[f"{layer}.qzeros"] = mx.random.randint(0, 2**31 - 1, (groups, outputs // 8))
        tensors[f"{layer}.scales"] = mx.random.uniform(shape=(groups, outputs))
    mx.save_safetensors(str(file), tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": group}
    (folder / "config.json").write_text(json.dumps(config))
