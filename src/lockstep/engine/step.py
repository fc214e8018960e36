"""The step: everything a rank needs in order to act, in one small message.

Rank 0's scheduler makes steps; every rank, rank 0 included, executes the same steps in the same order.
A *batch* is a set of sequences that are computed together and share one batched KV cache; its rows are
in the order in which the sequences joined. Pipelined decode keeps one batch (micro-batch) per stage in
flight.
"""

from __future__ import annotations

import msgspec


class Create(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Make a new batch of `rows` sequences whose caches are empty."""

    batch: int
    rows: int


class Move(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Move these rows of batch `source`, in this order, behind the rows of `target`, which may be new.

    The other rows of `source` stay, in their order; a batch that has no rows left is gone.
    """

    target: int
    source: int
    rows: list[int]


class Keep(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Keep only these rows of a batch, in this order; no rows at all drops the batch."""

    batch: int
    rows: list[int]


class Save(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Copy one row's cache, as it is when this edit's turn comes, into the prefix cache as `entry`."""

    batch: int
    row: int
    entry: int


class Restore(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Make a new batch of one row from the first `tokens` tokens of prefix-cache `entry`."""

    batch: int
    entry: int
    tokens: int


class Evict(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget a prefix-cache entry."""

    entry: int


Edit = Create | Move | Keep | Save | Restore | Evict


class Prefill(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Append prompt tokens to each row of a batch.

    `tokens` has one list per row; shorter rows are padded on the right and unpadded in the cache.
    Nothing is sampled: the last prompt token is always left for the first decode. `logits` asks the last
    stage for the logits of all positions (prompt logprobs), which costs a full head pass.
    """

    batch: int
    tokens: list[list[int]]
    logits: bool = False

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.tokens)


class Decode(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Append one token to each row of a batch, and yield logits, or the places of the largest (`argmax`).

    With `broadcast`, every rank gets the tokens that are drawn. The batch's next decode may then go ahead
    with them before rank 0 has read them: it has no `tokens`, but the number of rows in `ahead`.
    """

    batch: int
    tokens: list[int]
    argmax: bool = False
    broadcast: bool = False
    ahead: int = 0

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return self.ahead or len(self.tokens)


Forward = Prefill | Decode


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Edits to the caches, in order, and then at most one forward pass."""

    index: int
    edits: list[Edit]
    forward: Forward | None = None


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """No step follows. `reason` is empty when all is well."""

    reason: str = ""
