"""Tiny random models of every architecture in mlx-lm, made here: nothing is downloaded.

A config is the fields of the architecture's own arguments that have a small value in COMMON, changed by
what SPECIAL says. Windows and chunks are shorter than the prompts of the tests, and kinds of layers
alternate, so that every kind of layer, mask and cache is met.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

LAYERS = 6
VOCAB = 128
FULL, SLIDING, LINEAR, CONV = "full_attention", "sliding_attention", "linear_attention", "conv"
MIXED = [SLIDING, FULL] * 3
ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in (FULL, SLIDING)}
LLAMA_4_ROPE = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
}

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "sliding_window": 8,
    "layer_types": MIXED,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "bias": False,
    "tie_word_embeddings": False,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_top_k": 2,
    "moe_topk": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    # state spaces and convolutions
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "state_size": 8,
    "ssm_state_size": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_rank": 8,
    "time_step_limit": [0.001, 100.0],
    "n_groups": 1,
    "conv_bias": False,
    "conv_L_cache": 3,
    "conv_window": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 2,
    # multipliers
    "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "dim_model_base": 32,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    # GPT-2 and its heirs
    "n_embd": 64,
    "n_head": 4,
    "n_layer": LAYERS,
    "n_positions": 512,
    "n_ctx": 512,
    "n_inner": 96,
    "use_qk_norm": True,
    "use_qkv_bias": False,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2, 4]},
    "bailing_moe_v3": {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 64,
        "n_layers": LAYERS,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v41": {
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_ratios": [0, 4, 4, 4, 4, 4],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3],
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "exaone_moe": {"is_moe_layer": [False, True, True, True, True, True]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gear": {"layer_types": [FULL, SLIDING, "conv_mixer"] * 2},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "rope_local_base_freq": 1e4,
        "final_logit_softcapping": 30.0,
        "activation_sparsity_pattern": [0.5] * LAYERS,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 3,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "hunyuan": {
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 2.0, "factor": 1.0},
    },
    "iquestloopcoder": {"loop_window_size": 8},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": {
        "linear_attn_config": {
            "kda_layers": [1, 2, 4, 5],
            "full_attn_layers": [3, 6],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "gate_lower_bound": -5.0,
            "use_full_rank_gate": True,
        },
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "routed_expert_hidden_size": 32,
        "attn_res_block_size": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 2, 4, 5],
            "full_attn_layers": [3, 6],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
    },
    "laguna": {"rope_parameters": ROPES},
    "lfm2": {
        "layer_types": [CONV, FULL] * 3,
        "block_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {"layer_types": [CONV, FULL] * 3, "use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {"block_size": 512, "n_kv_heads": 2},
    "llama4": {
        "attention_chunk_size": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "rope_scaling": None,
    },
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0, 1, 1]},
    "longcat_flash": {
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "zero_expert_type": "identity",
        "attention_method": "MLA",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "num_layers": 4,
    },
    "longcat_flash_ngram": {
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
        "num_layers": 4,
    },
    "mamba2": {"num_heads": 8},
    "mellum": {"rope_parameters": ROPES},
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 512,
        }
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0] * 3,
        "moe_layer_freq": [0, 1] * 3,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1e4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "dense_intermediate_size": 96,
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        "moe_layer_freq": None,
        "layer_types": [FULL, "minimax_m3_sparse"] * 3,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral3": {"rope_parameters": LLAMA_4_ROPE},
    "mistral4": {"rope_parameters": LLAMA_4_ROPE},
    "muse_glimmer": {"rope_parameters": {"rope_theta": 1e4}},
    "muse_spark": {
        "post_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e4},
        "layer_rope_theta": [1e4, 0] * 3,
        "final_logit_softcapping": 30.0,
        "output_multiplier": 0.5,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ]
        * 2,
    },
    "nemotron_h": {"layers_block_type": None, "hybrid_override_pattern": list("M*-E") + ["M", "*"]},
    "olmo_hybrid": {"layer_types": [LINEAR, FULL] * 3},
    "openelm": {
        "num_transformer_layers": LAYERS,
        "model_dim": 64,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_multipliers": [1.0, 1.25, 1.5, 1.0, 1.25, 1.5],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
    },
    "phixtral": {"num_vocab": VOCAB, "model_dim": 64, "num_heads": 4, "rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16, "mamba_step": 2, "attention_window_size": 8},
    "plamo3": {"sliding_window_pattern": 2},
    "qwen": {"kv_channels": 16},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"] * 3,
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "spark2_5": {"rope_parameters": ROPES},
    "step3p5": {"num_attention_groups": 2, "share_expert_dim": 32, "moe_layers_enum": "1,2,3,4,5"},
}

# Whose arguments the text_config of a multimodal architecture has.
TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}


def architectures() -> list[str]:
    """Every module of mlx-lm that holds a model, by file name: nothing is imported."""
    import mlx_lm.models

    folder = Path(mlx_lm.models.__path__[0])
    names = [info.name for info in pkgutil.iter_modules([str(folder)])]
    return [
        n
        for n in names
        if re.search(r"^class Model\(|import.* Model\b", (folder / f"{n}.py").read_text(), re.M)
    ]


def config(name: str) -> dict[str, Any]:
    """A tiny config of architecture `name`, as config.json has it."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    if "text_config" not in inspect.signature(module.ModelArgs).parameters:
        return _fields(name, module.ModelArgs)
    text = TEXT.get(name)
    if text is not None:
        nested = config(text)
        nested = nested.get("text_config", nested)
    else:
        kinds = [getattr(module, kind, None) for kind in ("TextArgs", "TextConfig", "TextModelArgs")]
        if not any(kinds):
            raise NotImplementedError("no tiny checkpoint of it can be made yet")
        nested = _fields(name, next(kind for kind in kinds if kind is not None))
    return {"model_type": name, "text_config": nested} | {
        k: nested[k] for k in ("vocab_size",) if k in nested
    }


def _fields(name: str, arguments: type) -> dict[str, Any]:
    known = {key: COMMON[key] for key in inspect.signature(arguments).parameters if key in COMMON}
    return known | {"model_type": name} | SPECIAL.get(name, {})


def save(name: str, folder: Path, **changes: Any) -> None:
    """Write a random checkpoint of architecture `name` in Hugging Face layout, in float32.

    `changes` are for its config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(name) | changes
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(len(name))
    # from_dict may change what it is given.
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(settings))))
    model.update(tree_map(_shaken, model.parameters()))
    (folder / "config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))


def _shaken(parameter: mx.array) -> mx.array:
    # Many parameters begin as zeros or ones, where a mistake would not show.
    if not mx.issubdtype(parameter.dtype, mx.floating):
        return parameter
    return parameter.astype(mx.float32) + 0.05 * mx.random.normal(parameter.shape)
