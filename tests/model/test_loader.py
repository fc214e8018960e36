"""Loading reads what a stage needs and nothing else, and says what is wrong with a checkpoint."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from lockstep.errors import LockstepError, UsageError
from lockstep.model.checkpoint import inspect
from lockstep.model.loader import Loaded, load, stages_may_begin
from model import fake_hub, tiny
from model.memory_wire import Wire

ROOT = Path(__file__).parents[2]


def load_stage(folder: Path, span: tuple[int, int], rank: int, size: int) -> Loaded:
    return load(inspect(folder), span, rank, size, Wire().to(Wire()))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny.save("llama", tmp_path)
    return tmp_path


def rewrite(folder: Path, change: dict[str, mx.array | None]) -> None:
    file = folder / "model.safetensors"
    tensors = mx.load(str(file)) | change  # type: ignore[operator]
    mx.save_safetensors(str(file), {k: v for k, v in tensors.items() if v is not None})


@pytest.fixture
def no_collector():
    """Python without the collector that frees what refers to itself, which may run late or never."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_stage_holds_what_its_weight_bytes_say(llama: Path, no_collector: None):
    mx.clear_cache()
    held = mx.get_active_memory()
    loaded = load(inspect(llama), (2, 4), 1, 3, Wire().to(Wire()))
    mx.synchronize()  # What weights were made of goes when mlx's thread gets to it.
    assert abs(mx.get_active_memory() - held - loaded.weight_bytes) < 20_000


def test_loading_never_holds_more_than_the_stage_and_its_largest_tensor(llama: Path):
    large = 8_000_000
    settings = json.loads((llama / "config.json").read_text()) | {"intermediate_size": 16384}
    (llama / "config.json").write_text(json.dumps(settings))
    names = {"gate_proj": (16384, 64), "up_proj": (16384, 64), "down_proj": (64, 16384)}
    half = {
        f"model.layers.{i}.mlp.{k}.weight": mx.ones(s, mx.float16) for i in range(6) for k, s in names.items()
    }
    rewrite(llama, half)
    del half
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_stage(llama, (0, 3), 1, 2)
    assert loaded.weight_bytes > 3 * 3 * 16384 * 64 * 4
    assert mx.get_peak_memory() - held < loaded.weight_bytes + large


def test_a_missing_tensor_is_named_only_where_it_is_needed(llama: Path):
    rewrite(llama, {"model.layers.5.mlp.up_proj.weight": None})
    assert load_stage(llama, (0, 3), 1, 2).weight_bytes > 0
    with pytest.raises(LockstepError, match=r"model\.layers\.5\.mlp\.up_proj\.weight.*fetch"):
        load_stage(llama, (3, 6), 0, 2)


def test_a_tensor_of_another_shape_is_named(llama: Path):
    rewrite(llama, {"model.norm.weight": mx.ones(65)})
    with pytest.raises(LockstepError, match=r"model\.norm\.weight.*\(65,\).*\(64,\)"):
        load_stage(llama, (3, 6), 0, 2)


def test_a_tensor_that_the_config_has_no_place_for_is_named(llama: Path):
    rewrite(llama, {"model.layers.6.mlp.up_proj.weight": mx.ones(1)})
    with pytest.raises(LockstepError, match=r"model\.layers\.6\.mlp\.up_proj\.weight"):
        load_stage(llama, (3, 6), 0, 2)


def test_a_truncated_file_is_named(llama: Path):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LockstepError, match=r"model\.safetensors.*truncated"):
        load_stage(llama, (3, 6), 0, 2)


def test_an_unknown_model_type_is_refused(llama: Path):
    settings = json.loads((llama / "config.json").read_text()) | {"model_type": "nonesuch"}
    (llama / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="nonesuch"):
        load_stage(llama, (3, 6), 0, 2)
    with pytest.raises(UsageError, match="nonesuch"):
        load(inspect(llama), (0, 6), 0, 1)


def test_a_config_that_lacks_a_field_is_an_error_of_one_line(llama: Path):
    settings = json.loads((llama / "config.json").read_text())
    del settings["hidden_size"]
    (llama / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="hidden_size"):
        load(inspect(llama), (0, 6), 0, 1)


@pytest.mark.parametrize(("span", "rank"), [((3, 6), 1), ((0, 3), 0), ((3, 3), 0), ((0, 7), 1)])
def test_a_span_that_is_no_stage_of_this_rank_is_refused(llama: Path, span: tuple[int, int], rank: int):
    with pytest.raises(UsageError, match="cannot have layers"):
        load_stage(llama, span, rank, 2)


def test_where_stages_may_begin_is_known_without_loading(tmp_path: Path):
    tiny.save("gemma4", tmp_path)
    mx.clear_cache()
    held = mx.get_active_memory()
    assert stages_may_begin(inspect(tmp_path)) == (1, 2)
    assert mx.get_active_memory() - held < 10_000


RANK = """
import json, sys
import mlx.core as mx
from lockstep.model import checkpoint, hub_parts, loader
from lockstep.model.tensor import loader as tensor_loader
from model.memory_wire import Wire
path = checkpoint.resolve("org/tiny")
result = {"begin": loader.stages_may_begin(checkpoint.inspect(path))}
found = checkpoint.inspect(path)
result["weight_bytes"] = loader.load(found, (3, 6), 0, 2, Wire().to(Wire())).weight_bytes
result["in_parts"] = sum(tensor.nbytes for tensor in hub_parts.held(path).values())
if sys.argv[1:]:
    result["all"] = tensor_loader.load(checkpoint.inspect(path), [1], mx.distributed.init()).weight_bytes
    result["all_in_parts"] = sum(tensor.nbytes for tensor in hub_parts.held(path).values())
print(json.dumps(result))
"""


def rank(tmp_path: Path, hub: fake_hub.FakeHub, *arguments: str) -> Any:
    done = hub.run(tmp_path, RANK, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def experts_apart(folder: Path) -> dict[str, mx.array]:
    """The experts of real checkpoints are single tensors, which mlx-lm stacks."""
    tiny.save("qwen3_moe", folder)
    apart = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        prefix, _, kind = name.partition(".mlp.switch_mlp.")
        experts = {f"{prefix}.mlp.experts.{i}.{kind}": mx.contiguous(one) for i, one in enumerate(array)}
        apart |= experts if kind else {name: array}
    (folder / "model.safetensors").unlink()
    return apart


def test_a_stage_downloads_only_the_tensors_that_its_own_are_made_from(tmp_path: Path):
    tensors = experts_apart(tmp_path / "source")
    mx.save_safetensors(str(tmp_path / "source" / "model.safetensors"), tensors, {"format": "mlx"})
    with fake_hub.serve("org/tiny", tmp_path / "source") as hub:
        result = rank(tmp_path, hub, "then all")
    assert result["weight_bytes"] == load_stage(tmp_path / "source", (3, 6), 0, 2).weight_bytes
    assert result["in_parts"] == result["weight_bytes"]
    assert result["all_in_parts"] == result["all"] == sum(array.nbytes for array in tensors.values())


def test_files_that_a_stage_needs_whole_are_downloaded_as_they_are(tmp_path: Path):
    source = tmp_path / "source"
    groups: dict[str, dict[str, mx.array]] = {"first": {}, "last": {}, "table": {}}
    for name, array in experts_apart(source).items():
        number = name.partition("layers.")[2].partition(".")[0]
        part = "table" if "embed" in name else "last" if not number or int(number) > 2 else "first"
        groups[part][name] = array
    weight_map = {}
    for part, tensors in groups.items():
        mx.save_safetensors(str(source / f"model-{part}.safetensors"), tensors, {"format": "mlx"})
        weight_map |= dict.fromkeys(tensors, f"model-{part}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with fake_hub.serve("org/tiny", source) as hub:
        result = rank(tmp_path, hub)
    assert result["begin"] == [1, 2, 3, 4, 5]
    assert result["weight_bytes"] == load_stage(source, (3, 6), 0, 2).weight_bytes
    downloaded = {file.name for file in (tmp_path / "hf").rglob("model-*.safetensors")}
    assert downloaded == {"model-last.safetensors"}
    assert result["in_parts"] == 0
