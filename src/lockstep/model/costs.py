"""What the parts of a model cost, from the names and shapes of its tensors and from its config alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.errors import UsageError
from lockstep.model.headers import TensorInfo
from lockstep.model.quantized import Config, Held, Tensors, held_bytes

Part = int | Literal["embedding", "head"]


@dataclass(frozen=True)
class ModelCosts:
    """What each part of a model costs in the precision it is computed in. All tuples are per layer.

    `head_bytes` is norm and head, the whole table included where the head is tied to the embedding: then
    the first and the last stage both need the table, and a single rank needs it once.
    """

    layer_bytes: tuple[int, ...]
    read_bytes: tuple[int, ...]
    """Bytes read for one token: fewer than `layer_bytes` where only some experts are active."""
    embedding_bytes: int
    head_bytes: int
    tied: bool
    kv_bytes_per_token: tuple[int, ...]
    kv_window: tuple[int | None, ...]
    """Tokens after which a layer's cache stops growing; None where it never does."""
    largest_tensor_bytes: int
    max_context: int
    vocab_size: int

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def total_bytes(self) -> int:
        """All weights, each held once."""
        return sum(self.layer_bytes) + self.head_bytes + (0 if self.tied else self.embedding_bytes)

    def kv_bytes(self, layer: int, context: int) -> int:
        """Cache of one layer for `context` tokens."""
        window = self.kv_window[layer]
        return self.kv_bytes_per_token[layer] * (context if window is None else min(context, window))


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:(?!\w*norm)\w*embed\w*|wte|wpe)\.(?:\w+\.)?(?:weight|scales|biases)$")
_HEAD_TABLE = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|head|output_layer)\.(?:weight|scales|biases)$")
_NOT_TEXT = re.compile(
    r"(?:^|\.)(?:vision\w*|visual|vit|audio\w*|\w*projector|embed_vision|embed_audio|mtp\w*|image_newline)\."
)
_EXPERT = re.compile(r"\.(?:experts|switch_mlp)\.")
_REUSING = re.compile(r"\.kv_reuse_layers\.(\d+)\.")
_PROJECTION = re.compile(r"(?P<module>.*?)\.?(?P<projection>\w+)\.(?P<kind>weight|qweight|weight_packed)")
_RECURRENT = re.compile(r"\.(?:A_log|dt_bias|dt_proj|conv1d|x_proj|w_lora)\b")


def part_of(name: str, reusing: int = 0) -> Part | None:
    """The part of the model that a tensor belongs to; None for vision towers and the like: not used.

    `reusing` is the first of the layers that have no keys of their own, where a model counts them apart.
    """
    if _NOT_TEXT.search(name):
        return None
    if found := _REUSING.search(name):
        return reusing + int(found[1])
    if found := _LAYER.search(name):
        return int(found[1])
    return "embedding" if _EMBEDDING.search(name) and not _HEAD_TABLE.search(name) else "head"


def text_config(config: Config) -> Config:
    """The language model's part of a config, whose keys may also stand at the top."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def layer_count(config: Config) -> int:
    """Number of layers that the config asks for."""
    count = _first(
        text_config(config),
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_transformer_layers",
    )
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"config.json names no number of layers (num_hidden_layers): found {count!r}")
    return count


def _first_reusing(text: Config, count: int) -> int:
    """The layer from which on there are no caches of their own: the keys are those of the one before."""
    return count - int(text.get("num_kv_reuse_layers") or 0)


def is_tied(config: Config, tensors: Tensors) -> bool:
    """Whether the head is the embedding table, by the config or because there is no other table."""
    if text_config(config).get("tie_word_embeddings") is True:
        return True
    return not any(part_of(name) == "head" and _HEAD_TABLE.search(name) for name in tensors)


def parts(config: Config, tensors: Tensors) -> dict[Part, dict[str, TensorInfo]]:
    """The tensors of each layer, of the embedding and of the head, without those that no rank loads.

    Raises UsageError when the layers that the weights name are not the layers that the config asks for.
    """
    count, tied = layer_count(config), is_tied(config, tensors)
    extra = int(text_config(config).get("num_nextn_predict_layers") or 0)
    reusing = _first_reusing(text_config(config), count)
    result: dict[Part, dict[str, TensorInfo]] = {"embedding": {}, "head": {}}
    result |= {layer: {} for layer in range(count)}
    for name, tensor in tensors.items():
        part = part_of(name, reusing)
        if part is None or (tied and _HEAD_TABLE.search(name)):
            continue
        if isinstance(part, int) and count <= part < count + extra:
            continue
        if part not in result:
            raise UsageError(
                f"config.json has {count} layers, but {tensor.file} holds {name}: wrong config or weights"
            )
        result[part][name] = tensor
    empty = [part for part, held in result.items() if not held and part != "head"]
    if empty:
        raise UsageError(
            f"the weights lack {'layer ' if isinstance(empty[0], int) else 'the '}{empty[0]}, "
            f"config.json has {count} layers: files are missing, or the config is another model's"
        )
    return result


def model_costs(config: Config, tensors: Tensors, held: Held) -> ModelCosts:
    """Costs of a model that is held in this form."""
    text, named_parts = text_config(config), parts(config, tensors)
    layers = range(layer_count(config))
    caching = range(_first_reusing(text, len(layers)))
    tied = is_tied(config, tensors)
    sizes = {
        part: {name: held_bytes(config, named, name, held) for name in named}
        for part, named in named_parts.items()
    }
    totals = {part: sum(size.values()) for part, size in sizes.items()}
    return ModelCosts(
        layer_bytes=tuple(totals[layer] for layer in layers),
        read_bytes=tuple(_read_bytes(text, sizes[layer]) for layer in layers),
        embedding_bytes=totals["embedding"],
        head_bytes=totals["head"] + (totals["embedding"] if tied else 0),
        tied=tied,
        kv_bytes_per_token=tuple(
            _kv_width(_of_layer(text, layer, len(layers)), named_parts[layer])
            * (2 if held == "stored" else 4)
            if layer in caching
            else 0
            for layer in layers
        ),
        kv_window=tuple(_windows(text, layer) for layer in layers),
        largest_tensor_bytes=max(nbytes for size in sizes.values() for nbytes in size.values()),
        max_context=max_context(config),
        vocab_size=_vocab_size(text, named_parts["embedding"]),
    )


def max_context(config: Config) -> int:
    """Most tokens that the model was made for."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return int(_first(text_config(config), *names) or 4096)


def _read_bytes(text: Config, sizes: Mapping[str, int]) -> int:
    experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    active = _first(
        text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts"
    )
    if not (isinstance(experts, int) and isinstance(active, int) and 0 < active < experts):
        return sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if _EXPERT.search(name))
    return sum(sizes.values()) - routed + routed * active // experts


def _kv_width(text: Config, tensors: Tensors) -> int:
    """Numbers that one layer's cache keeps for each token; 0 for layers with a state of fixed size.

    Taken from the shapes of the projections, so that it holds for any mixture of layers.
    """
    modules: dict[str, dict[str, int]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _PROJECTION.fullmatch(name)
        if found and found["projection"] in _PROJECTIONS:
            if found["kind"] == "qweight":
                rows = tensor.shape[1] * 8  # stored the other way round, 8 numbers in one
            else:
                rows = max(tensor.shape) if found["projection"] in _FUSED else tensor.shape[0]
            modules[found["module"]][found["projection"]] = rows
    recurrent = {
        m for m in modules for name in tensors if name.startswith(f"{m}.") and _RECURRENT.search(name)
    }
    return sum(_module_kv_width(text, rows) for module, rows in modules.items() if module not in recurrent)


def _module_kv_width(text: Config, rows: Mapping[str, int]) -> int:
    heads = int(_first(text, "num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads") or 1)
    kv_heads = int(_first(text, "num_key_value_heads", "multi_query_group_num", "num_kv_heads") or heads)
    if "kv_a_proj_with_mqa" in rows and text.get("model_type") in _EXPANDED_MLA:
        value = text.get("v_head_dim") or int(text["hidden_size"]) // heads
        return heads * (int(text["qk_nope_head_dim"]) + int(text["qk_rope_head_dim"]) + int(value))
    if "kv_a_proj_with_mqa" in rows:
        return int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])
    for key, value in _SEPARATE.items():
        if key in rows:
            # An indexer has keys alone, and mlx-lm's cache then holds zeros of the same size as values.
            return rows[key] + rows.get(value, rows[key])
    for fused in _FUSED & rows.keys():
        return rows[fused] * 2 * kv_heads // (heads + 2 * kv_heads)
    # Only queries: the keys are another layer's, but mlx-lm keeps a cache for each.
    return 2 * kv_heads * int(text.get("head_dim") or rows["q_proj"] // heads)


_SEPARATE = {"k_proj": "v_proj", "key_proj": "value_proj", "wk": "wv", "c_k": "c_v", "attn_key": "attn_value"}
_FUSED = {"qkv_proj", "c_attn", "query_key_value", "Wqkv", "attn_qkv", "qkv", "wqkv", "W_pack", "q_k_v_proj"}
_PROJECTIONS = {"kv_a_proj_with_mqa", "q_proj", *_SEPARATE, *_SEPARATE.values(), *_FUSED}
_EXPANDED_MLA = ("deepseek_v2", "minicpm3", "youtu_llm")
"""Architectures whose mlx-lm cache keeps the expanded keys and values instead of the latent."""


def _windows(text: Config, layer: int) -> int | None:
    window = text.get("sliding_window")
    if not isinstance(window, int):
        return None
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else None
    pattern = _first(text, "sliding_window_pattern", "_sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 1:
        return window if (layer + 1) % pattern else None
    return None


def _of_layer(text: Config, layer: int, count: int) -> Config:
    """The config with one layer's entries of what is listed for each layer."""
    return {k: v[layer] if isinstance(v, list) and len(v) == count else v for k, v in text.items()}


def _vocab_size(text: Config, embedding: Tensors) -> int:
    return int(text.get("vocab_size") or max(tensor.shape[0] for tensor in embedding.values()))


def _first(config: Config, *keys: str) -> Any:
    """The value of the first of these keys that is there; configs name one thing in many ways."""
    return next((config[key] for key in keys if config.get(key) is not None), None)
