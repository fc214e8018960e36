"""From a GGUF file of a llama model to a folder in Hugging Face layout: config, weights, tokenizer.

Only what the default model needs: Q4_1 and Q8_0 blocks, which MLX reads as affine groups of 32 with 4 and
8 bits, and a byte-level BPE tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import mlx.core as mx

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GROUP_SIZE = 32
_CONTROL_TOKEN = 3


def convert(gguf: Path, folder: Path) -> None:
    """Write config, generation_config, weights and the tokenizer's files into `folder`."""
    import mlx.core as mx

    weights, metadata = cast(
        "tuple[dict[str, mx.array], dict[str, Any]]", mx.load(str(gguf), return_metadata=True)
    )
    config = _config(metadata)
    renamed = {_name(name): _to_hugging_face(name, array, config) for name, array in weights.items()}
    config["quantization"] = _quantization(renamed)
    mx.save_safetensors(str(folder / "model.safetensors"), renamed, {"format": "mlx"})
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})
    _write(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    _tokenizer(metadata, folder / "tokenizer.json")


def _name(name: str) -> str:
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name):
        return f"model.layers.{layer[1]}.{_NAMES[layer[2]]}.{layer[3]}"
    module, kind = name.split(".")
    return f"{_NAMES[module]}.{kind}"


def _to_hugging_face(name: str, array: mx.array, config: Mapping[str, Any]) -> mx.array:
    import mlx.core as mx

    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(name.split(".")[-2])
    if heads:
        # GGUF interleaves the two halves of each head that rotary embedding pairs up.
        rows, columns = array.shape
        array = array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return array.astype(mx.float16) if array.dtype == mx.float32 else array


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(metadata[f"llama.{key}"].item())

    def token(key: str) -> int:
        return int(metadata[f"tokenizer.ggml.{key}_token_id"].item())

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("rope.dimension_count"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"].item(), 9),
        "rope_theta": float(metadata["llama.rope.freq_base"].item()),
        "tie_word_embeddings": True,
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "pad_token_id": token("padding"),
        "torch_dtype": "float16",
    }


def _quantization(weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """4 bits, and by name the modules that have another number of bits."""
    quantization: dict[str, Any] = {"group_size": _GROUP_SIZE, "bits": 4}
    for name, scales in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "scales":
            bits = weights[f"{module}.weight"].shape[-1] * 32 // (scales.shape[-1] * _GROUP_SIZE)
            if bits != 4:
                quantization[module] = {"group_size": _GROUP_SIZE, "bits": bits}
    return quantization


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {
        f"{short}_token": tokens[metadata[f"tokenizer.ggml.{long}_token_id"].item()]
        for long, short in kinds.items()
    }
    return named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(metadata["llama.context_length"].item()),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _tokenizer(metadata: Mapping[str, Any], path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(path))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))
