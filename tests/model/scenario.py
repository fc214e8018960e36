"""The same sequence of passes for any shard: prefill, decode, batches that join, shrink and are padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from lockstep.engine.batch import Batch


def tokens(rows: int, length: int, seed: int = 0) -> list[list[int]]:
    return [[(7 * i * i + 3 * i + 11 * row + seed) % 97 + 1 for i in range(length)] for row in range(rows)]


class Flow:
    """One batch on every stage in `shards`, the first layers first; a rank of its own has one stage."""

    def __init__(self, shards: Sequence[Any], rows: int = 1) -> None:
        self.shards = shards
        self.batches = [Batch.of_rows([s.make_cache() for _ in range(rows)]) for s in shards]
        self.outputs: list[mx.array] = []

    def run(self, rows: list[list[int]], logits: bool = True) -> None:
        lengths = [len(row) for row in rows]
        padded = mx.array([row + [0] * (max(lengths) - len(row)) for row in rows])
        for shard, batch in zip(self.shards, self.batches, strict=True):
            if min(lengths) < max(lengths):
                batch.pad_right(lengths)
            output = shard.forward(padded, batch.caches, "logits" if logits else "nothing")
            if min(lengths) < max(lengths):
                batch.unpad()
            mx.eval(output, batch.state())
        if logits and output.shape[:2] == padded.shape:  # and not a message to the next stage
            # Behind a shorter row's end the logits mean nothing.
            self.outputs += [output[i, : lengths[i]] for i in range(len(rows))]


def single(shards: Sequence[Any]) -> list[mx.array]:
    """Prefill in two chunks, then decode: longer than every window of the tiny models."""
    flow = Flow(shards)
    flow.run(tokens(1, 11))
    flow.run(tokens(1, 6, 5), logits=False)
    for i in range(4):
        flow.run(tokens(1, 1, i))
    return flow.outputs


def joined(shards: Sequence[Any]) -> list[mx.array]:
    """Sequences of different lengths, prefilled alone, decoded together; then one leaves."""
    flow = Flow(shards)
    for i, length in enumerate((9, 4, 13)):
        other = Flow(shards)
        other.run(tokens(1, length, i))
        if i == 0:
            flow = other
        else:
            for mine, theirs in zip(flow.batches, other.batches, strict=True):
                mine.join(theirs)
            flow.outputs += other.outputs
        flow.run(tokens(i + 1, 1, i))
    flow.run(tokens(3, 1, 2))
    for batch in flow.batches:
        batch.keep([2, 0])
    for i in range(3):
        flow.run(tokens(2, 1, i))
    return flow.outputs


def padded(shards: Sequence[Any]) -> list[mx.array]:
    """A batch that is prefilled at once, its shorter rows padded on the right."""
    flow = Flow(shards, rows=3)
    flow.run([row[:length] for row, length in zip(tokens(3, 13), (5, 13, 9), strict=True)])
    for i in range(4):
        flow.run(tokens(3, 1, i))
    return flow.outputs


def difference(outputs: Sequence[mx.array], expected: Sequence[mx.array]) -> float:
    """The largest deviation of any pass, relative to that pass's largest logit."""
    assert len(outputs) == len(expected)
    worst = 0.0
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.shape == wanted.shape, (got.shape, wanted.shape)
        deviation = float(mx.abs(got - wanted).max()) / float(mx.abs(wanted).max())
        worst = max(worst, deviation if deviation == deviation else float("inf"))
    return worst
