"""How models use layers, caches and weights, on models small enough to know the answer."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from lockstep.errors import UsageError
from lockstep.model.graph import parameters
from lockstep.model.loader import open_model
from lockstep.model.structure import observe
from model import tiny


def model(name: str, folder: Path) -> nn.Module:
    tiny.save(name, folder)
    return open_model(folder)[0]


def test_each_stage_needs_its_layers_and_the_ends_their_tables(tmp_path: Path):
    llama = model("llama", tmp_path)
    structure = observe(llama)
    own = [set(parameters(layer)) for layer in llama.layers]
    first, last = structure.parameters(0, 2), structure.parameters(2, 6)
    assert first | last == set(parameters(llama)) and not first & last
    assert len(first) == len(own[0]) * 2 + 1 and "model.embed_tokens.weight" in first
    assert last >= {"model.norm.weight", "lm_head.weight"}
    assert structure.cuts() == (1, 2, 3, 4, 5)


def test_a_tied_table_is_needed_at_both_ends(tmp_path: Path):
    structure = observe(model("cohere", tmp_path))
    assert "model.embed_tokens.weight" in structure.parameters(0, 1) & structure.parameters(5, 6)
    assert "model.embed_tokens.weight" not in structure.parameters(1, 5)


def test_observing_evaluates_nothing_and_changes_nothing(tmp_path: Path):
    llama = model("llama", tmp_path)
    classes = [type(layer) for layer in llama.layers]
    held = mx.get_active_memory()
    observe(llama)
    assert mx.get_active_memory() - held < 10_000
    assert [type(layer) for layer in llama.layers] == classes


def test_caches_belong_to_the_layers_that_are_given_them(tmp_path: Path):
    # Only some kinds of nemotron's layers have a cache at all.
    nemotron = model("nemotron_h", tmp_path)
    kinds = [layer.block_type for layer in nemotron.layers]
    expected = tuple(i for i, kind in enumerate(kinds) if kind in "M*")
    assert observe(nemotron).cache_layers == expected


@pytest.mark.parametrize(
    ("name", "reason"), [("iquestloopcoder", "calls 0 of its 6"), ("nanbeige", "runs layer 0 after layer 5")]
)
def test_models_that_loop_over_their_layers_are_refused(tmp_path: Path, name: str, reason: str):
    looping = model(name, tmp_path)
    with pytest.raises(UsageError, match=reason):
        observe(looping)


def test_a_model_that_looks_at_its_activations_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="looks at its activations"):
        observe(model("dbrx", tmp_path))
