"""Pipelines give the answer of the whole model: the same program on 1, 2 and 3 ranks, unevenly cut."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from lockstep.errors import UsageError
from lockstep.model.checkpoint import inspect
from lockstep.model.graph import parameters
from lockstep.model.loader import load, open_model
from lockstep.model.pipeline import Stage
from lockstep.model.structure import observe
from lockstep.model.whole import Whole
from model import scenario, tiny
from model.memory_wire import Wire
from ranks import run_ranks

# Plain, with sliding windows, experts, state spaces beside attention, latent attention, messages of more
# than one array, a head that is tied to the embedding, layers that share
# keys and values, and layers that are told an offset which only another kind of cache knows.
ARCHITECTURES = [
    "llama",
    "qwen3",
    "gemma3",
    "qwen3_moe",
    "nemotron_h",
    "deepseek_v3",
    "rwkv7",
    "cohere",
    "hunyuan",
    "bailing_moe_linear",
]
PROGRAM = str(Path(__file__).parent.parent / "pipeline_program.py")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ARCHITECTURES:
        tiny.save(name, folder / name)
    return folder


@pytest.mark.parametrize(("n", "backend"), [(1, "ring"), (2, "ring"), (3, "mpi")])
def test_every_stage_count_gives_the_logits_of_the_whole_model(checkpoints: Path, n: int, backend: str):
    ranks = run_ranks([PROGRAM, str(checkpoints), backend], n, backend, timeout_s=110)
    assert [rank.status for rank in ranks] == [0] * n, "".join(rank.stderr[-2000:] for rank in ranks)
    results = [json.loads(rank.stdout) for rank in ranks]
    for name in ARCHITECTURES:
        assert results[0][name]["error"] < 1e-4, name
        assert {result[name]["vocab_size"] for result in results} == {tiny.VOCAB}
        held = sum(result[name]["weight_bytes"] for result in results)
        # A tied table is needed at both ends.
        whole = whole_bytes(checkpoints / name)
        table = tiny.VOCAB * tiny.COMMON["hidden_size"] * 4
        assert whole <= held <= whole * 1.02 + (table if n > 1 and name in ("cohere", "hunyuan") else 0), name


def whole_bytes(folder: Path) -> int:
    return load(inspect(folder), (0, 6), 0, 1).weight_bytes


def stage(folder: Path, span: tuple[int, int], wires: tuple[Wire, Wire]) -> Stage:
    model, _, _ = open_model(folder)
    return Stage(model, observe(model), span, wires[0].to(wires[1]))


def test_a_pass_without_logits_returns_what_was_received_and_fills_the_caches(checkpoints: Path):
    wires = Wire(), Wire(), Wire()
    stages = [
        stage(checkpoints / "llama", (0, 4), wires[:2]),
        stage(checkpoints / "llama", (4, 6), wires[1:]),
    ]
    model, _, _ = open_model(checkpoints / "llama")
    whole = Whole(model)
    caches = [s.make_cache() for s in (*stages, whole)]
    prompt = mx.array(scenario.tokens(1, 5))
    sent, received, _ = (
        s.forward(prompt, cache, want="nothing") for s, cache in zip((*stages, whole), caches, strict=True)
    )
    assert received.shape == sent.shape == (1, 5, tiny.COMMON["hidden_size"])
    token = mx.array([[9]])
    *_, mine, expected = (s.forward(token, c) for s, c in zip((*stages, whole), caches, strict=True))
    assert scenario.difference([mine], [expected]) < 1e-4


def test_messages_can_have_another_dtype_than_the_weights(checkpoints: Path):
    model, _, _ = open_model(checkpoints / "llama")
    first = Stage(model, observe(model), (0, 3), Wire().to(Wire()), wire=mx.bfloat16)
    assert first.forward(mx.array([[1, 2]]), first.make_cache()).dtype == mx.bfloat16


def test_a_stage_holds_only_its_own_caches_and_one_counter_for_each_kind_it_lacks(checkpoints: Path):
    pattern = [type(c).__name__ for c in Whole(open_model(checkpoints / "gemma3")[0]).make_cache()]
    assert set(pattern) == {"KVCache", "RotatingKVCache"}
    for span in ((0, 1), (1, 6)):
        own = [type(c).__name__ for c in stage(checkpoints / "gemma3", span, (Wire(), Wire())).make_cache()]
        assert own[: span[1] - span[0]] == pattern[slice(*span)]
        assert set(own) == set(pattern) and len(own) <= span[1] - span[0] + 1


def test_a_counter_costs_next_to_nothing(checkpoints: Path):
    # The first layer of this one slides; another stage's full attention is only counted.
    only = stage(checkpoints / "gemma3", (0, 1), (Wire(), Wire()))
    cache = only.make_cache()
    mx.eval(only.forward(mx.array(scenario.tokens(1, 20)), cache), [c.state for c in cache])
    assert [c.offset for c in cache] == [20, 20]
    assert cache[1].keys.shape[1] == cache[1].keys.shape[3] == 1


def test_layers_of_other_stages_leave_no_weights_behind(checkpoints: Path):
    model, _, _ = open_model(checkpoints / "qwen3_moe")
    Stage(model, observe(model), (2, 4), Wire().to(Wire()))
    assert [bool(parameters(layer)) for layer in model.layers] == [i in (2, 3) for i in range(6)]


def test_a_model_that_shares_caches_between_layers_is_cut_only_where_that_works(tmp_path: Path):
    tiny.save("gemma3n", tmp_path)
    model, _, _ = open_model(tmp_path)
    structure = observe(model)
    assert structure.cuts() == (1, 2)
    with pytest.raises(UsageError, match=r"cannot be split before layer 3.*begin at layer: 1, 2"):
        Stage(model, structure, (3, 6), Wire().to(Wire()))
