"""Costs: names, shapes and config alone must tell what mlx-lm's models really hold."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from lockstep.errors import UsageError
from lockstep.model.costs import max_context, model_costs, part_of, parts
from lockstep.model.headers import TensorInfo

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
}


def tensors(shapes, dtype="BF16"):
    bytes_each = {"BF16": 2, "U32": 4, "F32": 4, "F8_E4M3": 1}

    def tensor(shape):
        own = dtype
        if isinstance(shape[0], str):
            own, shape = shape[0], shape[1:]
        nbytes = bytes_each[own]
        for side in shape:
            nbytes *= side
        return TensorInfo("model.safetensors", own, tuple(shape), 0, nbytes)

    return {name: tensor(shape) for name, shape in shapes.items()}


def llama(layers=2, head=True, prefix="model."):
    shapes = {f"{prefix}embed_tokens.weight": (100, 64), f"{prefix}norm.weight": (64,)}
    for layer in range(layers):
        base = f"{prefix}layers.{layer}"
        shapes |= {
            f"{base}.self_attn.q_proj.weight": (64, 64),
            f"{base}.self_attn.k_proj.weight": (32, 64),
            f"{base}.self_attn.v_proj.weight": (32, 64),
            f"{base}.mlp.up_proj.weight": (128, 64),
        }
    if head:
        shapes["lm_head.weight"] = (100, 64)
    return tensors(shapes)


def test_names_of_many_families_are_put_into_their_part():
    expected = {
        "model.layers.12.mlp.up_proj.weight": 12,
        "transformer.h.3.attn.c_attn.weight": 3,
        "backbone.layers.7.mixer.A_log": 7,
        "model.language_model.layers.5.mlp.gate.weight": 5,
        "language_model.model.embed_tokens.weight": "embedding",
        "transformer.wte.weight": "embedding",
        "model.embed_tokens.scales": "embedding",
        "model.norm.weight": "head",
        "model.embedding_norm.weight": "head",
        "lm_head.weight": "head",
        "embed_out.weight": "head",
        "vision_tower.encoder.layers.3.mlp.fc1.weight": None,
        "model.visual.blocks.0.attn.qkv.weight": None,
        "multi_modal_projector.linear_1.weight": None,
        "mtp.layers.0.mlp.up_proj.weight": None,
    }
    assert {name: part_of(name) for name in expected} == expected


def test_a_tied_head_counts_on_both_ends_and_once_in_all():
    costs = model_costs(LLAMA, llama(head=False), held="stored")
    assert costs.tied
    assert (costs.embedding_bytes, costs.head_bytes) == (12800, 12800 + 128)
    assert costs.total_bytes == sum(costs.layer_bytes) + 12800 + 128


def test_a_head_that_the_config_ties_is_not_loaded_even_if_the_file_has_one():
    tied = model_costs(LLAMA | {"tie_word_embeddings": True}, llama(), held="stored")
    assert tied == model_costs(LLAMA, llama(head=False), held="stored")


def test_quantized_weights_grow_to_float32_by_their_own_group_size():
    quantized = llama(head=False) | tensors(
        {
            "model.layers.0.mlp.up_proj.weight": ("U32", 128, 8),
            "model.layers.0.mlp.up_proj.scales": (128, 1),
            "model.layers.0.mlp.up_proj.biases": (128, 1),
            "model.layers.1.mlp.up_proj.weight": ("U32", 128, 16),
            "model.layers.1.mlp.up_proj.scales": (128, 2),
            "model.layers.1.mlp.up_proj.biases": (128, 2),
        }
    )
    config = LLAMA | {
        "quantization": {
            "group_size": 64,
            "bits": 4,
            "model.layers.1.mlp.up_proj": {"group_size": 32, "bits": 8},
        }
    }
    assert model_costs(config, quantized, held="float32") == model_costs(
        LLAMA, llama(head=False), held="float32"
    )
    stored = model_costs(config, quantized, held="stored")
    assert stored.layer_bytes[0] == 2 * 128 * 64 + 128 * 8 * 4 + 2 * 128 * 2


def test_only_the_active_experts_are_read_for_a_token():
    experts = {"model.layers.1.mlp.switch_mlp.up_proj.weight": (8, 10, 64)}
    config = LLAMA | {"num_experts": 8, "num_experts_per_tok": 2}
    costs = model_costs(config, llama() | tensors(experts), held="stored")
    assert costs.layer_bytes[1] - costs.read_bytes[1] == 8 * 10 * 64 * 2 * 6 // 8
    assert costs.layer_bytes[0] == costs.read_bytes[0]


def test_keys_and_values_of_grouped_heads_are_counted_in_the_compute_dtype():
    assert model_costs(LLAMA, llama(), held="stored").kv_bytes_per_token == (128, 128)
    assert model_costs(LLAMA, llama(), held="float32").kv_bytes_per_token == (256, 256)


def test_a_sliding_window_bounds_only_the_layers_that_slide():
    config = LLAMA | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    costs = model_costs(config, llama(), held="stored")
    assert (costs.kv_bytes(0, 1000), costs.kv_bytes(1, 1000)) == (128 * 16, 128 * 1000)


def test_a_config_with_nested_text_config_and_a_vision_tower_is_the_text_model():
    nested = {"model_type": "vlm", "text_config": LLAMA, "vision_config": {"num_hidden_layers": 9}}
    seen = llama(prefix="language_model.model.") | tensors({"vision_tower.layers.0.fc.weight": (64, 64)})
    assert (
        model_costs(nested, seen, held="stored").layer_bytes
        == model_costs(LLAMA, llama(), "stored").layer_bytes
    )


@pytest.mark.parametrize(("layers", "reason"), [(1, "lack layer 1"), (3, "has 2 layers, but .*layers.2")])
def test_weights_of_another_number_of_layers_than_the_config_are_refused(layers, reason):
    with pytest.raises(UsageError, match=reason):
        parts(LLAMA, llama(layers=layers))


def test_layers_for_predicting_several_tokens_are_left_out():
    assert set(parts(LLAMA | {"num_nextn_predict_layers": 1}, llama(layers=3))) == {0, 1, "embedding", "head"}


def test_a_config_without_a_number_of_layers_is_refused():
    with pytest.raises(UsageError, match="num_hidden_layers"):
        parts({"model_type": "llama"}, llama())


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt_oss",
        "qwen3_moe",
        "deepseek_v3",
        "deepseek_v2",
        "falcon_h1",
        "lfm2",
        "qwen3_next",
        "longcat_flash",
        "afm7",
        "openelm",
    ],
)
def test_costs_are_what_the_architecture_holds_in_mlx_lm(name, tmp_path):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    from lockstep.model import checkpoint

    tiny.save(name, tmp_path)
    model, _ = load_model(tmp_path, lazy=True)
    costs = checkpoint.costs(checkpoint.inspect(tmp_path), held="float32")
    held = [sum(p.nbytes for _, p in tree_flatten(layer.parameters())) for layer in model.layers]
    assert list(costs.layer_bytes) == held
    assert costs.total_bytes == sum(p.nbytes for _, p in tree_flatten(model.parameters()))

    caches = make_prompt_cache(model)
    mx.eval(model(mx.arange(4)[None], cache=caches))
    without = [0] * (costs.layers - len(caches))
    assert [4 * _width(cache) for cache in caches] + without == list(costs.kv_bytes_per_token)
    windows = [getattr(cache, "max_size", None) for cache in caches]
    assert [w for w in windows if w] == [w for w in costs.kv_window if w]


def _width(cache):
    """Numbers per token in an mlx-lm cache."""
    if hasattr(cache, "caches"):
        return sum(_width(inner) for inner in cache.caches)
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    return sum(a.shape[1] * a.shape[3] for a in (keys, values) if a is not None)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 7}, 7),
        ({"text_config": {"max_position_embeddings": 8}}, 8),
        ({"n_positions": 9}, 9),
        ({}, 4096),
    ],
)
def test_the_context_may_be_that_of_the_text_model(config, tokens):
    assert max_context(config) == tokens
