"""A sequence as rank 0 knows it, and the roster that says which sequence sits in which row of a batch."""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from dataclasses import dataclass, field

from lockstep.engine.prompt_cache import Match
from lockstep.engine.request import Finished, Logprobs, PromptLogprobs, Request, Sampled, Sampling, Token


@dataclass(eq=False, slots=True)
class Roster:
    """A batch: its id, and its sequences in row order. `rows` is replaced, never changed in place."""

    batch: int
    rows: list[Sequence]

    def __post_init__(self) -> None:
        for sequence in self.rows:
            sequence.roster = self


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """One request on its way from the queue to its last token.

    `cached` counts the tokens that the KV cache holds once every published step has run; `pending` are
    the tokens still to be prefilled; `match` is what the prefix cache had, `reused` what was taken from it.
    """

    request: Request
    max_tokens: int
    generated: list[int] = field(init=False)
    match: Match | None = None
    pending: list[int] = field(default_factory=list)
    cached: int = 0
    reused: int = 0
    prompt_logprobs: list[Logprobs | None] = field(default_factory=lambda: [None])
    roster: Roster | None = None
    finished: bool = False
    astray: bool = False
    """Its text cannot come to match the request's grammar any more: it is cut off."""
    stop_token: int | None = None
    """The one that ended it."""

    def __post_init__(self) -> None:
        self.generated = list(self.request.generated)

    @property
    def prompt(self) -> Sequenced[int]:
        """The prompt's tokens, the request's own list."""
        return self.request.prompt

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return self.request.sampling

    @property
    def position(self) -> int:
        """The index of the next token to be drawn, counted from the first generated one."""
        return len(self.generated)

    @property
    def drawing(self) -> int:
        """The position of the token that the last published decode draws."""
        return self.cached - len(self.request.prompt)

    @property
    def may_go_ahead(self) -> bool:
        """Whether the next decode may go ahead before the token that the last published one draws is read.

        Not before the first one is: who asked has waited for it.
        """
        return 0 < self.drawing < self.max_tokens - 1 and not self.sampling.reads_text

    @property
    def reserved(self) -> int:
        """KV tokens this sequence may come to need."""
        return len(self.request.prompt) + self.max_tokens

    @property
    def last(self) -> int:
        """The newest token, which the next decode appends to the cache."""
        return self.generated[-1] if self.generated else self.request.prompt[-1]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether all logits of the prompt are needed; after a restart the client has them already."""
        return self.request.prompt_logprobs and not self.request.generated

    def take_pending(self, most: int) -> list[int]:
        """The next tokens to prefill, now counted as cached."""
        chunk, self.pending = self.pending[:most], self.pending[most:]
        self.cached += len(chunk)
        return chunk

    def known(self) -> list[int]:
        """Prompt and generated tokens in one new list."""
        return self.request.prompt + self.generated

    def held(self) -> list[int]:
        """The tokens in the cache once every published step has run; one may have gone ahead of the end."""
        drawn = self.known() if self.stop_token is None else [*self.known(), self.stop_token]
        return drawn[: self.cached]

    def accept(self, drawn: Sampled) -> tuple[list[PromptLogprobs | Token], str]:
        """Take the next token: what to tell about it, and why it was the last (empty if it was not)."""
        request, position = self.request, self.position
        told: list[PromptLogprobs | Token] = []
        if position == 0 and self.wants_prompt_logprobs:
            told.append(PromptLogprobs(request.id, self.prompt_logprobs))
        if position >= self.max_tokens:
            return told, "length"
        if drawn.token in request.stop_tokens:
            self.stop_token = drawn.token
            return told, "length" if self.astray else "stop"
        self.generated.append(drawn.token)
        told.append(Token(request.id, drawn.token, drawn.logprobs))
        return told, "length" if position + 1 == self.max_tokens else ""

    def finish(self, reason: str) -> Finished:
        """End here; the row leaves its batch with the next step."""
        self.finished = True
        prompt = len(self.request.prompt)
        return Finished(
            id=self.request.id,
            reason=reason,
            prompt_tokens=prompt,
            completion_tokens=len(self.generated),
            cached_tokens=min(self.reused, prompt),
        )
