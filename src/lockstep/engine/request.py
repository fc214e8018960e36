"""What is asked of the engine, and what it answers. These cross processes: front to rank 0 and back."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

GREEDY_BELOW = 1e-5
"""The temperature below which only the likeliest token is ever drawn; divided by less, logits overflow."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is drawn from logits. A greedy one ignores the filters below the temperature."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    logprobs: int | None = None
    """How many alternatives to report beside the token's own logprob; None reports nothing."""
    grammar: str = ""
    """What the text has to match (engine/grammar.py); empty for any text."""

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def is_argmax(self) -> bool:
        """Whether the token is the likeliest one, and nothing else is asked of the logits."""
        return self.is_greedy and self.logprobs is None and not (self.changes_logits or self.grammar)

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is drawn from them."""
        return self._penalises or bool(self.logit_bias)

    @property
    def reads_text(self) -> bool:
        """Whether the tokens so far have to be known to draw the next one from its logits."""
        return self._penalises or bool(self.grammar)

    @property
    def _penalises(self) -> bool:
        return any((self.repetition_penalty - 1, self.frequency_penalty, self.presence_penalty))


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Continue `prompt + generated` by at most `max_tokens - len(generated)` tokens.

    `generated` is empty at first; after a restart it holds the tokens the client already has.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    generated: list[int] = []
    stop_tokens: list[int] = []
    sampling: Sampling = Sampling()
    prompt_logprobs: bool = False
    priority: int = 0
    """Lower runs first; equal priorities run in order of arrival."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this request any more."""

    id: str


class Logprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities of one drawn token and of the likeliest alternatives."""

    token: float
    top: list[tuple[int, float]]


class Sampled(NamedTuple):
    """What was drawn for one row of a decode step."""

    token: int
    logprobs: Logprobs | None = None


class Token(msgspec.Struct, frozen=True, tag=True):
    """One more token of a request. The stop token itself is never sent."""

    id: str
    token: int
    logprobs: Logprobs | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """One entry per prompt token; the first has none."""

    id: str
    logprobs: list[Logprobs | None]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """A request ended: `stop` (a stop token), `length` or `cancelled`."""

    id: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float = 0.0
    """Seconds between arrival at rank 0 and the first step for this request."""


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """A request was never started. `retry` says whether the same request could succeed later."""

    id: str
    reason: str
    retry: bool
    code: str | None = None
    """OpenAI's name for the reason, if it has one."""


class Forget(msgspec.Struct, frozen=True):
    """Nobody waits for any request any more: drop all of them, running or waiting, without an answer."""


Command = Request | Cancel | Forget
Event = Token | PromptLogprobs | Finished | Rejected
