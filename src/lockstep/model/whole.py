"""A model whose layers are all on this rank, and what its caches can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from lockstep.model.cache_parts import leaves
from lockstep.model.shard import Want


class Whole:
    """All layers of `model`, as a Shard."""

    def __init__(self, model: Module, batchable: bool = True) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._model = model
        self.make_cache: Callable[[], list[Any]] = lambda: make_prompt_cache(model)
        caches = self.make_cache()
        self.trimmable, mergeable, self.replaceable = abilities(caches)
        self.batchable = mergeable and batchable
        self.vocab_size = int(model(mx.zeros((1, 1), mx.int32), cache=caches).shape[-1])

    def forward(self, tokens: mx.array, cache: list[Any], want: Want = "logits") -> mx.array:
        """Logits [rows, length, vocab] of `tokens` [rows, length]; the tokens when nothing is wanted."""
        output: mx.array = self._model(tokens, cache=cache)
        return wanted(want, output, tokens)

    def broadcast(self, drawn: mx.array | None, output: mx.array) -> mx.array:
        """`drawn`: no other rank needs it."""
        assert drawn is not None, "one rank alone is rank 0"
        return drawn


def wanted(want: Want, logits: mx.array, otherwise: mx.array) -> mx.array:
    """What the stage with the head returns; `otherwise` when nothing is wanted."""
    if want == "argmax":
        return mx.argmax(logits, axis=-1)
    return logits if want == "logits" else otherwise


def abilities(caches: Any) -> tuple[bool, bool, bool]:
    """Whether all of these fresh caches can (drop tokens at any length, be merged with others, and then have
    one row replaced by another)."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    parts = [part for cache in caches for part in leaves(cache)]
    trimmable = all(c.is_trimmable() and not isinstance(c, RotatingKVCache) for c in parts)
    return trimmable, all(hasattr(c, "merge") for c in parts), all(type(c) is KVCache for c in caches)
