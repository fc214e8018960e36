"""Executes steps on this rank: edits to the caches, then one forward pass of this rank's shard."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import trim_prompt_cache

from lockstep.engine.batch import Batch, Caches, detached
from lockstep.engine.step import (
    Create,
    Decode,
    Edit,
    Evict,
    Forward,
    Keep,
    Move,
    Prefill,
    Restore,
    Save,
    Step,
)
from lockstep.model.shard import Shard, Want

Finish = Callable[[Step, mx.array], Sequence[mx.array]]
"""What the stage with the head makes of a step's logits: the arrays that rank 0 wants evaluated, those of a
decode beginning with the tokens that it draws, one per row."""


class Pending:
    """A step that the device is working on."""

    def __init__(self, wanted: Sequence[mx.array], caches: list[Any], hold: bool = True) -> None:
        """`caches` may be trees; what in them is not an array needs no device.

        Only with `hold` are they awaited, too: a step that begins before that writes into these very arrays,
        and would be awaited in this one's place.
        """
        self.wanted = wanted
        self._caches = caches if hold else []
        mx.async_eval(*wanted, *caches)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block until the device has finished."""
        mx.eval(*self.wanted, *self._caches)


class Executor:
    """Holds this rank's caches: batches in use, and prefix-cache entries."""

    def __init__(self, shard: Shard, finish: Finish | None = None) -> None:
        """`finish` is given on rank 0 only; the other ranks just evaluate what they send on."""
        self._shard = shard
        self._finish = finish
        self._batches: dict[int, Batch] = {}
        self._entries: dict[int, Caches] = {}

    @property
    def holds_anything(self) -> bool:
        """Whether any batch or prefix-cache entry is left."""
        return bool(self._batches or self._entries)

    def start(self, step: Step) -> Pending:
        """Edit the caches, build the forward pass and hand it to the device; does not wait for it."""
        for edit in step.edits:
            self._edit(edit)
        if step.forward is None:
            return Pending([], [])
        forward, batch = step.forward, self._batches[step.forward.batch]
        output = self._forward(forward, batch)
        wanted: Sequence[mx.array] = [output]
        if self._finish is not None and _has_logits(forward):
            wanted = self._finish(step, batch.visible(output))
        batch.drawn = None
        if isinstance(forward, Decode) and forward.broadcast:
            drawn = batch.spread(wanted[0]) if self._finish is not None else None
            batch.drawn = self._shard.broadcast(drawn, output).astype(mx.int32)
            wanted = [*wanted, batch.drawn]
        return Pending(wanted, batch.state(), hold=batch.drawn is None)

    def _edit(self, edit: Edit) -> None:
        batches = self._batches
        match edit:
            case Create(batch, rows):
                caches = [self._shard.make_cache() for _ in range(rows)]
                batches[batch] = Batch.of_rows(caches, replaceable=self._shard.replaceable)
            case Move(target, source, rows):
                moved = batches[source].take(rows)
                if not batches[source].rows:
                    del batches[source]
                if target in batches:
                    batches[target].join(moved)
                else:
                    batches[target] = moved
            case Keep(batch, []):
                del batches[batch]
            case Keep(batch, rows):
                batches[batch].keep(rows)
            case Save(batch, row, entry):
                self._entries[entry] = detached(batches[batch].row(row))
            case Restore(batch, entry, tokens):
                caches = _first(tokens, copy.deepcopy(self._entries[entry]))
                batches[batch] = Batch(caches, tokens, self._shard.replaceable)
            case Evict(entry):
                del self._entries[entry]

    def _forward(self, forward: Forward, batch: Batch) -> mx.array:
        rows = forward.rows
        assert batch.rows == rows, f"batch {forward.batch} has {batch.rows} rows, the step has {rows}"
        if isinstance(forward, Prefill):
            return self._prefill(forward, batch.settle())
        tokens = batch.drawn if forward.ahead else batch.spread(mx.array(forward.tokens))
        assert tokens is not None, f"the tokens of batch {forward.batch} were not broadcast"
        want: Want = "argmax" if forward.argmax else "logits"
        output = self._shard.forward(tokens, batch.caches, want)
        batch.note_seen([1] * rows)
        return output

    def _prefill(self, forward: Prefill, batch: Batch) -> mx.array:
        lengths = [len(tokens) for tokens in forward.tokens]
        longest = max(lengths)
        padded = mx.array([tokens + [0] * (longest - len(tokens)) for tokens in forward.tokens])
        uneven = min(lengths) < longest
        if uneven:
            batch.pad_right(lengths)
        output = self._shard.forward(padded, batch.caches, "logits" if forward.logits else "nothing")
        if uneven:
            batch.unpad()
        batch.note_seen(lengths)
        return output


def _has_logits(forward: Forward) -> bool:
    return isinstance(forward, Decode) or forward.logits


def _first(tokens: int, caches: Caches) -> Caches:
    """The caches as they were after `tokens` tokens."""
    surplus = max((cache.size() for cache in caches), default=0) - tokens
    if surplus > 0:
        trim_prompt_cache(caches, surplus)
    return caches
