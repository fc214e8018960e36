"""What a person asks of a run. Made once, from the command line; knows nothing of mlx."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from lockstep.engine.request import Sampling
from lockstep.errors import UsageError
from lockstep.model.partition import parse_split

Parallel = Literal["auto", "pipeline", "tensor"]
PARALLEL_FORMS = get_args(Parallel)

LONGEST_S = 1e6
"""Eleven days: what every timer and socket can count."""

Tell = Callable[[str], None]
"""Is told, in a few words, what is being done."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is spread over the ranks. `context` None leaves it to the model.

    Raises UsageError for a parallel form or a split that there is not.
    """

    model: str | None = None
    parallel: str = "pipeline"
    split: str = "auto"
    context: int | None = None
    self_test: bool = False

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL_FORMS:
            raise UsageError(f"--parallel {self.parallel}: use one of {', '.join(PARALLEL_FORMS)}")
        _, numbers = parse_split(self.split)
        if self.parallel == "auto" and numbers is not None:
            object.__setattr__(self, "parallel", "pipeline")  # Numbers alone are numbers of layers.


@dataclass(frozen=True)
class Deadlines:
    """How long each part of a run may take before it is given up; see `watchdog`.

    `step_s` is the shortest deadline of a step: one that is known to take longer gets more. Raises UsageError
    for what is no deadline.
    """

    join_s: float = 60.0
    load_s: float = 1800.0
    step_s: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value <= LONGEST_S:
                name = field.name.removesuffix("_s")
                raise UsageError(
                    f"LOCKSTEP_{name.upper()}_TIMEOUT (or --{name}-timeout) is {value:g}: "
                    f"give seconds above 0, at most {LONGEST_S:.0f}"
                )

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Deadlines:
        """From LOCKSTEP_JOIN_TIMEOUT, LOCKSTEP_LOAD_TIMEOUT and LOCKSTEP_STEP_TIMEOUT, in seconds."""
        names = ("join", "load", "step")
        given = {f"{name}_s": env.get(f"LOCKSTEP_{name.upper()}_TIMEOUT", "") for name in names}
        try:
            return cls(**{name: float(value) for name, value in given.items() if value})
        except ValueError as error:
            raise UsageError(f"LOCKSTEP_*_TIMEOUT must be seconds: {error}") from error


@dataclass(frozen=True)
class EngineOptions:
    """How much is taken on at once; see `engine.limits.Limits`. No `prefill_chunk` is the processor's."""

    max_rows: int = 32
    max_queue: int = 256
    prefill_chunk: int | None = None
    prompt_cache_tokens: int = 16384


@dataclass(frozen=True)
class Prompt:
    """What to generate from, and how. `raw` leaves the chat template out."""

    text: str
    raw: bool = False
    max_tokens: int = 256
    stop: Sequence[str] = ()
    sampling: Sampling = Sampling()
