"""`--parallel auto`: tensor or pipeline, from numbers alone. No mlx, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lockstep.errors import UsageError

Parallel = Literal["tensor", "pipeline"]

NO_PIPELINE = ("nccl",)
"""Backends whose send and receive mlx does not implement."""

WORTH_IT = 1.25
"""One request must become at least this much faster, or the all_reduces are not worth their trouble."""


def check_pipeline(backend: str, ranks: int) -> None:
    """Raises UsageError where ranks cannot send to each other."""
    if backend in NO_PIPELINE and ranks > 1:
        raise UsageError(
            f"mlx cannot send from rank to rank over {backend}, as a pipeline must: "
            "use --parallel tensor or --backend ring"
        )


@dataclass(frozen=True)
class Traffic:
    """What one token costs a whole model, and what the ranks can do."""

    read_bytes: int
    """Weights read for one token, all layers and the head together."""
    all_reduces: int
    """One after another for one token: two for most layers, and one for the embedding."""
    latency_s: float
    """Of one all_reduce of a hidden state between these ranks, as measured."""
    bytes_per_s: Sequence[float]
    """For each rank, how fast it reads weights while it computes."""

    @property
    def speedup(self) -> float:
        """How much faster one request gets, at most, when every rank computes its part of each layer.

        What every rank does in full, and waiting for the slower one, are not in it.
        """
        alone_s = self.read_bytes / max(self.bytes_per_s)
        together_s = self.read_bytes / sum(self.bytes_per_s) + self.all_reduces * self.latency_s
        return alone_s / together_s


def choose(traffic: Traffic, backend: str, refusal: str | None = None) -> tuple[Parallel, str]:
    """The parallel form, and why. `refusal` says why this model cannot be cut by tensors, if it cannot.

    A pipeline makes many requests faster and a single one never; tensor parallelism makes both faster, but
    waits for the network twice in every layer.
    """
    ranks = len(traffic.bytes_per_s)
    if ranks == 1:
        return "pipeline", "there is one rank: nothing is cut"
    if backend in NO_PIPELINE:
        return "tensor", f"mlx cannot send from rank to rank over {backend}, as a pipeline must"
    if refusal is not None:
        return "pipeline", f"tensor parallelism is out: {refusal}"
    waits_ms = 1e3 * traffic.all_reduces * traffic.latency_s
    numbers = (
        f"{traffic.all_reduces} all_reduces of {1e6 * traffic.latency_s:.0f} us over {backend} are "
        f"{waits_ms:.1f} ms per token, so {ranks} ranks make one request at most {traffic.speedup:.2f} times "
        "as fast"
    )
    return ("tensor" if traffic.speedup >= WORTH_IT else "pipeline"), numbers
