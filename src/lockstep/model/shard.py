"""What the engine needs from this rank's part of the model, whatever form the cut has."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import mlx.core as mx

Want = Literal["logits", "argmax", "nothing"]


class Shard(Protocol):
    """This rank's part of one model: its caches and its part of every forward pass."""

    vocab_size: int
    trimmable: bool
    """Every cache of the whole model, not only of this rank, can drop its newest tokens at any length."""
    batchable: bool
    """Every cache of the whole model can be merged with those of other sequences."""
    replaceable: bool
    """Every cache of the whole model has a part for each row alone, which another row can take over."""

    def make_cache(self) -> list[Any]:
        """Fresh caches of one sequence for what this rank computes, in layer order.

        They are mlx-lm caches, to be merged, extended, filtered, trimmed and evaluated like any other; the
        list may be empty. Positions in it mean something to the shard only: keep them as they are.
        """
        ...

    def forward(self, tokens: mx.array, cache: list[Any], want: Want = "logits") -> mx.array:
        """This rank's part of one forward pass; nothing is evaluated yet.

        `tokens` is [rows, length] int32, `cache` what make_cache() returned, or several of those merged.
        Returns logits [rows, length, vocab] on the stage with the head; on the others what was sent
        (evaluating it performs the send). Who wants the `argmax` gets the places [rows, length] of the
        largest logits instead. Who wants `nothing` gets an array of little cost from the stage with the head:
        evaluating it and the caches completes this rank's communication. The caches advance by `length`.
        """
        ...

    def broadcast(self, drawn: mx.array | None, output: mx.array) -> mx.array:
        """The tokens that rank 0 has `drawn` from the `output` of its last forward pass, on every rank.

        Like `drawn`, which is None on the other ranks, they are [rows, 1]. Not in a pipeline, where nothing
        flows back from rank 0.
        """
        ...
