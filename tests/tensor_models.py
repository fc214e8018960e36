"""Tiny random checkpoints of the shapes that tensor parallelism has to know, in mlx-lm's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

_BASE: dict[str, Any] = {
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 2,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_WIDE = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": False}
_AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama with 3 key/value heads": {
        "model_type": "llama",
        "hidden_size": 36,
        "intermediate_size": 64,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "qwen2 with biases, untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3 with norms per head": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "olmo2 with norms over all heads": {
        "model_type": "olmo2",
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "gemma3 with sliding windows": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
    },
    "gemma with 1 key/value head": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 8},
    "phi3 with fused projections": {"model_type": "phi3", "rope_scaling": None},
    "gpt_neox with grouped fused projections": {
        "model_type": "gpt_neox",
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.5,
        "num_key_value_heads": 8,
    },
    "cohere with a parallel block": {
        "model_type": "cohere",
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.5,
        "use_qk_norm": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe with a shared expert": {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 64,
        **_MOE,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        **_MOE,
    },
    "deepseek_v3 with latent attention": {
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 48,
        "num_key_value_heads": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "mamba2, of which nothing can be cut": {
        "model_type": "mamba2",
        "num_heads": 8,
        "head_dim": 16,
        "intermediate_size": 128,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": "auto",
        "layer_norm_epsilon": 1e-5,
    },
}
QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama, 4-bit, with biases": ({**_WIDE, "mlp_bias": True, "attention_bias": True}, _AFFINE),
    "llama, 3-bit": (_WIDE, {"group_size": 32, "bits": 3, "mode": "affine"}),
    "llama, mxfp4": (_WIDE, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
    "llama, mxfp8": (_WIDE, {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
    "llama, nvfp4": (_WIDE, {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
    "mixtral, 4-bit": ({**CONFIGS["mixtral"], "hidden_size": 128, "intermediate_size": 192}, _AFFINE),
}


def make_all(folder: Path) -> list[str]:
    """Write every checkpoint below `folder`; returns their names, which are their folders' names."""
    for name, config in CONFIGS.items():
        make(folder / _slug(name), {**_BASE, **config})
    for name, (config, quantization) in QUANTIZED.items():
        make(folder / _slug(name), {**_BASE, **config}, quantization)
    return [_slug(name) for name in [*CONFIGS, *QUANTIZED]]


def make(folder: Path, config: dict[str, Any], quantization: dict[str, Any] | None = None) -> None:
    """Write a checkpoint with random weights that are neither too even nor too wild to show a wrong cut."""
    from mlx_lm.utils import _get_classes

    mx.random.seed(0)
    kind, args = _get_classes(config)
    model = kind(args.from_dict(config))
    model.load_weights([(n, _random(n, a)) for n, a in tree_flatten(model.parameters())])
    if quantization:
        nn.quantize(model, **quantization, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
        config = {**config, "quantization": quantization}
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def _random(name: str, like: mx.array) -> mx.array:
    return mx.random.normal(like.shape) * 0.1 + (1.0 if "norm" in name else 0.0)


def _slug(name: str) -> str:
    return name.replace(",", "").replace("/", "-").replace(" ", "_")
