"""What the ranks say to each other over the control plane, besides the steps."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from lockstep.engine.step import Step, Stop


class Hello(msgspec.Struct, frozen=True, tag=True):
    """What a rank has: the first thing it says."""

    rank: int
    host: str
    pid: int
    device: str
    float32: bool
    """Computes in float32 whatever the checkpoint has, as CPUs do."""
    memory_bytes: int
    bytes_per_s: float
    """Weights read per second when decoding, as measured."""
    versions: dict[str, str]
    model: str
    """Digest of the model's config, so that every rank is known to load the same model."""
    revision: str = ""
    """The commit of a model from the Hub; "" for one in a folder."""


class Assignment(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Who computes what. `spans` are each rank's layers, [first, last + 1], by rank.

    In tensor parallel every rank has all layers, and of each a part in proportion to `weights`. `wire` is
    the dtype of hidden states between ranks that compute in different ones. `compact`: CPUs hold weights as
    stored, because there is too little memory for them in float32.
    """

    parallel: str
    spans: list[tuple[int, int]]
    weights: list[float] = []
    wire: str | None = None
    compact: bool = False

    @property
    def stages(self) -> int:
        """How many steps the ranks can work on at the same time."""
        return len(self.spans) if self.parallel == "pipeline" else 1


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A rank has loaded its shard."""

    rank: int
    weight_bytes: int
    peak_memory_bytes: int
    kv_tokens: int
    """How many tokens of KV cache fit into the memory that is left."""


class Tested(msgspec.Struct, frozen=True, tag=True):
    """What a rank's self-test has found; an empty `fault` means nothing."""

    rank: int
    fault: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A rank cannot go on, and has said why itself."""

    rank: int
    reason: str


FromRank = Hello | Ready | Tested | Failed
Message = TypeVar("Message", bound=Hello | Ready | Tested)
ToRank = Step | Stop | Assignment
