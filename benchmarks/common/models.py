"""Random checkpoints with a tokenizer: made once, so that nobody has to download any.

Most are qwen2, because mlx-lm can both pipeline and shard it. Every token that the model can generate is
plain text, and none ends the answer, so that each answer has exactly the tokens asked for, on every server.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from filelock import FileLock
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lockstep.bench.load import WORDS
from lockstep.model.cache import cache_folder

LAYOUT = 1
"""Counted up when the folders change, so that older ones are made again."""

GROUP = 64
"""Inputs with a scale and a bias of their own, in matrices of few bits."""


@dataclass(frozen=True)
class Shape:
    """A model by its numbers."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    type: str = "qwen2"
    bits: int = 32
    """Of a number in a matrix: 32 in float32, fewer in groups with a scale and a bias."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate


FULL = Shape("qwen2-450mb", layers=16, hidden=768, intermediate=2048, heads=12, kv_heads=4, vocab=16384)
WIDE = Shape("llama-420mb", 2, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocab=8192, type="llama")
"""Two layers of TinyLlama 1.1B: as wide as the models that people spread over machines, or nearly."""
FOUR_BIT = dataclasses.replace(WIDE, name="llama-400mb-4bit", layers=16, bits=4)
"""Most of TinyLlama 1.1B, which takes 2.8 GB in float32."""
LLAMA_8B = Shape(
    "llama-8b-400mb-4bit", 3, 4096, 14336, heads=32, kv_heads=8, vocab=16384, type="llama", bits=4
)
"""Three layers as wide as those of Llama 3.1 8B, which take 2.9 GB in float32."""
QUICK = Shape("qwen2-90mb", layers=8, hidden=512, intermediate=1408, heads=8, kv_heads=2, vocab=4096)
STEP = Shape("qwen2-step", layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=2048)
"""So little to compute that a step costs what everything else costs."""


def folder(shape: Shape) -> Path:
    """The checkpoint's folder; made if it is not there. Any number of processes may call this at once."""
    made = cache_folder() / f"bench-{shape.name}-{LAYOUT}"
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock"), timeout=300):
        if not (made / "model.safetensors.index.json").exists():
            with tempfile.TemporaryDirectory(dir=made.parent) as work:
                _make(shape, Path(work) / "model")
                shutil.rmtree(made, ignore_errors=True)
                (Path(work) / "model").rename(made)
    return made


def _make(shape: Shape, folder: Path) -> None:
    folder.mkdir()
    vocabulary, silent = _write_tokenizer(folder, shape.vocab)
    config = {
        "architectures": [f"{shape.type.capitalize()}ForCausalLM"],
        "model_type": shape.type,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": 0,
    }
    if shape.bits < 32:
        config["quantization"] = {"group_size": GROUP, "bits": shape.bits}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = _tensors(shape, silent)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert vocabulary == shape.vocab


def _tensors(shape: Shape, silent: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        if shape.bits == 32:
            numbers = rng.standard_normal((rows, columns), dtype=np.float32)
            tensors[f"{name}.weight"] = numbers * np.float32(columns**-0.5)
        else:
            # Evenly spread numbers with the same deviation.
            step = (12 / columns) ** 0.5 / 2**shape.bits
            words = (rows, columns * shape.bits // 32)
            tensors[f"{name}.weight"] = rng.integers(2**32, size=words, dtype=np.uint32)
            tensors[f"{name}.scales"] = np.full((rows, columns // GROUP), step, np.float16)
            tensors[f"{name}.biases"] = tensors[f"{name}.scales"] * np.float16(-(2**shape.bits - 1) / 2)

    matrix("model.embed_tokens", shape.vocab, shape.hidden)
    for part in ("weight",) if shape.bits == 32 else ("scales", "biases"):
        tensors[f"model.embed_tokens.{part}"][silent] = 0
    tensors["model.norm.weight"] = np.ones(shape.hidden, np.float32)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        for kind, rows in (("q", queries), ("k", keys), ("v", keys)):
            matrix(f"{name}.self_attn.{kind}_proj", rows, shape.hidden)
            if shape.type == "qwen2":
                tensors[f"{name}.self_attn.{kind}_proj.bias"] = np.zeros(rows, np.float32)
        matrix(f"{name}.self_attn.o_proj", shape.hidden, queries)
        matrix(f"{name}.mlp.gate_proj", shape.intermediate, shape.hidden)
        matrix(f"{name}.mlp.up_proj", shape.intermediate, shape.hidden)
        matrix(f"{name}.mlp.down_proj", shape.hidden, shape.intermediate)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = np.ones(shape.hidden, np.float32)
    return tensors


def _write_tokenizer(folder: Path, size: int) -> tuple[int, list[int]]:
    """Byte-level like most: our prompt words are one token each. Returns its size and the silent tokens.

    Silent are those that would not be text by themselves: the end and single bytes.
    """
    tokens = ["<|end|>", *pre_tokenizers.ByteLevel.alphabet()]
    silent = list(range(len(tokens)))
    space = "Ġ"
    pairs = [(a, b) for a in ascii_lowercase for b in ascii_lowercase]
    merges = [(space, a) for a in ascii_lowercase] + pairs
    merges += [(space + word[0], word[1:]) for word in WORDS]
    merges += [(a + b, c + d) for a, b in pairs for c, d in pairs]
    merges = merges[: size - len(tokens)]
    tokens += [a + b for a, b in merges]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens), silent
