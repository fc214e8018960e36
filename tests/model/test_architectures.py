"""The table of architectures: complete, and what it refuses is refused."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from lockstep.errors import UsageError
from lockstep.model.architectures import TABLE, architecture, support
from model import tiny


def test_every_architecture_of_mlx_lm_has_an_entry_and_100_work_in_a_pipeline():
    table = json.loads((files("lockstep.model") / TABLE).read_text())
    assert set(tiny.architectures()) <= set(table)
    assert sum(entry["pipeline"] is None for entry in table.values()) >= 100


def test_a_model_type_that_mlx_lm_maps_to_another_module_is_found_there():
    assert architecture({"model_type": "mistral"}) == "llama"
    assert architecture({"model_type": "kimi_k2"}) == "deepseek_v3"
    hybrid = {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]}
    assert architecture(hybrid) == "bailing_moe_v3"


def test_what_is_not_known_to_work_is_refused_with_the_reason():
    support({"model_type": "llama"}).check_pipeline()
    with pytest.raises(UsageError, match="nanbeige.*runs layer 0 after layer 5.*-n 1"):
        support({"model_type": "nanbeige"}).check_pipeline()
    with pytest.raises(UsageError, match="nonesuch.*not been tried"):
        support({"model_type": "nonesuch"}).check_pipeline()
    with pytest.raises(UsageError, match="no model_type"):
        support({})


def test_models_that_mlx_lm_cannot_batch_are_known():
    assert not support({"model_type": "gemma2"}).batch
    assert support({"model_type": "llama"}).batch
