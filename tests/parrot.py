"""A real model that says what it is told to: each token is followed by just one other."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer

from model import tiny
from tiny_tokenizer import CALLING, byte_level

END = 1


def parrot(folder: Path, pieces: list[str]) -> Path:
    """A llama that answers every chat with these different pieces of text, a token each, and ends."""
    byte_level(folder, CALLING)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (before,) = tokenizer.encode("\n").ids
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tiny.save("llama", folder, vocab_size=size, hidden_size=size)
    file = folder / "model.safetensors"
    weights = {name: mx.zeros_like(array) for name, array in mx.load(str(file)).items()}
    weights |= {name: mx.ones_like(array) for name, array in weights.items() if "norm" in name}
    said = [before, *(tokenizer.token_to_id(piece) for piece in pieces), END]
    table = mx.zeros((size, size))
    for token, following in zip(said, said[1:], strict=False):
        table[following, token] = 1
    weights |= {"model.embed_tokens.weight": mx.eye(size), "lm_head.weight": table}
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    return folder
