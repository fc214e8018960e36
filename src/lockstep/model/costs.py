"""What the parts of a model cost, from the names and shapes of its tensors and from its config alone."""

from __future__ import annotations

from dataclasses import dataclass


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
