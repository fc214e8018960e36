"""What a person asks of a run. Made once, from the command line; knows nothing of mlx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.engine.request import Sampling

Progress = Callable[[str], None]
"""Is told, in a few words, what is being done."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is spread over the ranks. `context` None leaves it to the model."""

    model: str | None = None
    split: str = "auto"
    context: int | None = None


@dataclass(frozen=True)
class EngineOptions:
    """How much is taken on at once; see `scheduler.Limits`."""

    max_rows: int = 32
    max_queue: int = 256
    prefill_chunk: int = 512
    prompt_cache_tokens: int = 16384


@dataclass(frozen=True)
class Prompt:
    """What to generate from, and how. `raw` leaves the chat template out."""

    text: str
    raw: bool = False
    max_tokens: int = 256
    stop: Sequence[str] = ()
    sampling: Sampling = Sampling()
