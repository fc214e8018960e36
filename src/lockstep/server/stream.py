"""From the engine's events to pieces of text. Whole and streamed answers are made of the same pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from lockstep.engine.request import Event, Finished, Logprobs, PromptLogprobs, Rejected, Request, Token
from lockstep.engine.text import TextStream, Tokenizer, decode
from lockstep.server.errors import ApiError
from lockstep.server.inbox import Failed, Inbox
from lockstep.server.link import FrontLink
from lockstep.server.reasoning import Reasoning
from lockstep.server.tools import Call, ToolCalls

RETRY_AFTER_S = 5.0
CANCEL_PATIENCE_S = 1.0
"""How long to wait for the engine's last word on a request that a stop string has ended."""


@dataclass(frozen=True)
class ScoredToken:
    """One token with its probability, None for the first of a prompt; `offset` is where its text starts."""

    token: int
    offset: int
    logprobs: Logprobs | None


@dataclass(frozen=True)
class Piece:
    """The next bit of one choice. With a `finish` reason it is the last."""

    index: int
    text: str
    scores: list[ScoredToken]
    finish: str | None = None
    calls: list[Call] = field(default_factory=list)
    thought: str = ""


@dataclass
class Choice:
    """One of the answers to a request, as far as it has come."""

    index: int
    request: Request
    text: TextStream
    tools: ToolCalls | None = None
    """None where the model may call none."""
    reasoning: Reasoning | None = None
    """None where what it thinks is not told from what it says."""
    echo: str = ""
    shown_tokens: int | None = None
    """None for all; 0 when only the prompt is wanted."""
    tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float | None = None
    """None until the engine has told."""
    finish: str | None = None
    _scores: list[ScoredToken] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return self.text.stopped

    def feed(self, event: Event) -> Piece | None:
        """What can be shown after this event; None for nothing."""
        match event:
            case Token(_, token, logprobs):
                return None if self.shown_tokens == 0 else self._token(token, logprobs)
            case PromptLogprobs(_, logprobs):
                return self._prompt(logprobs)
            case Finished():
                self.cached_tokens, self.queue_s = event.cached_tokens, event.queue_s
                return self._finish("length" if self.shown_tokens == 0 else event.reason)
            case Rejected(_, reason, retry, code):
                if retry:
                    raise ApiError(429, reason, code="queue_full", retry_after_s=RETRY_AFTER_S)
                raise ApiError(400, reason, code=code)

    def _token(self, token: int, logprobs: Logprobs | None) -> Piece | None:
        if self.stopped or self.finish:
            return None
        self.tokens += 1
        if self.request.sampling.logprobs is not None:
            self._scores.append(ScoredToken(token, len(self.echo) + self.text.decoded, logprobs))
        thought, text, calls = self._split(self.text.feed(token))
        if self.reasoning and self.reasoning.inside:
            self.reasoning_tokens += 1
        if self.stopped or (self.tools and self.tools.full):
            self.finish = self._reason("stop")
        if thought or text or calls or self.finish:
            return Piece(self.index, text, self._certain_scores(), self.finish, calls, thought)
        return None

    def _prompt(self, logprobs: Sequence[Logprobs | None]) -> Piece:
        offsets = TextStream(self.text.tokenizer)
        scores = []
        for token, own in zip(self.request.prompt, logprobs, strict=True):
            scores.append(ScoredToken(token, offsets.decoded, own))
            offsets.feed(token)
        return Piece(self.index, self.echo, scores)

    def _finish(self, reason: str) -> Piece | None:
        if self.finish:
            return None
        text = self.text.finish()
        reason = "stop" if self.stopped else reason
        thought, text, calls = self._split(text, last=True, cut=reason != "stop")
        self.finish = self._reason(reason)
        scores = self._certain_scores() if self.stopped else self._scores
        return Piece(self.index, text, scores, self.finish, calls, thought)

    def _split(self, text: str, last: bool = False, cut: bool = False) -> tuple[str, str, list[Call]]:
        """What of `text` is thought, what is said, and the calls that are complete with it."""
        last = last or self.stopped
        thought, said = self.reasoning.feed(text, last) if self.reasoning else ("", text)
        said, calls = self.tools.feed(said, last, cut) if self.tools else (said, [])
        return thought, said, calls

    def _reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self.tools and self.tools.count else reason

    def _certain_scores(self) -> list[ScoredToken]:
        """Those of the tokens whose text is out, so that a stop string shows nowhere."""
        shown = len(self.echo) + self.text.shown
        certain = [score for score in self._scores if score.offset < shown]
        self._scores = self._scores[len(certain) :]
        return certain


def choices(
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    stop: Sequence[str] = (),
    echo: bool = False,
    shown_tokens: int | None = None,
    continues: bool = False,
    tools: Callable[[], ToolCalls | None] = lambda: None,
    reasoning: Callable[[Sequence[int]], Reasoning | None] = lambda prompt: None,
) -> list[Choice]:
    """One choice for each engine request, in order. `continues` the text of the prompt, or begins one."""
    return [
        Choice(
            index,
            request,
            TextStream(tokenizer, stop, after=request.prompt if continues else ()),
            tools(),
            reasoning(request.prompt),
            echo=decode(tokenizer, request.prompt) if echo else "",
            shown_tokens=shown_tokens,
        )
        for index, request in enumerate(requests)
    ]


class Answer:
    """The answer to one client's request: submits its choices, and cancels what is left when closed.

    Long work is done in `beside`, not on the event loop.
    """

    def __init__(self, link: FrontLink, choices: Sequence[Choice], beside: Executor) -> None:
        self.choices = choices
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._link = link
        self._beside = beside
        self._inbox = Inbox()
        self._by_request = {choice.request.id: choice for choice in choices}
        self._open = set(self._by_request)
        for choice in choices:
            link.submit(choice.request, self._inbox)

    async def begin(self, timeout_s: float) -> None:
        """Give the engine a moment to refuse, while that can still become an HTTP status."""
        event = await self._inbox.wait(timeout_s)
        if isinstance(event, Failed):
            raise _unavailable(event)
        if isinstance(event, Rejected):
            self._by_request[event.id].feed(event)

    async def pieces(self, keepalive_s: float) -> AsyncGenerator[list[Piece]]:
        """Pieces as they come, all choices mixed; an empty list after `keepalive_s` of silence."""
        echoed = [c for c in self.choices if c.echo and not c.request.prompt_logprobs]
        if echoed:
            yield [Piece(choice.index, choice.echo, []) for choice in echoed]
        while self._open:
            only_last_words = all(choice.finish for choice in self.choices)
            events = await self._inbox.take(CANCEL_PATIENCE_S if only_last_words else keepalive_s)
            if not events and only_last_words:
                return
            pieces = [piece for event in events if (piece := await self._piece(event)) is not None]
            if pieces or not events:
                yield pieces

    def close(self) -> None:
        """Cancel what has not ended."""
        for request_id in self._open:
            self._link.cancel(request_id)
        self._open.clear()

    async def _piece(self, event: Event | Failed) -> Piece | None:
        if isinstance(event, PromptLogprobs):
            return await asyncio.get_running_loop().run_in_executor(self._beside, self._feed, event)
        return self._feed(event)

    def _feed(self, event: Event | Failed) -> Piece | None:
        if isinstance(event, Failed):
            raise _unavailable(event)
        choice = self._by_request[event.id]
        if isinstance(event, Token):
            self.last_token_s = time.monotonic()
            self.first_token_s = self.first_token_s or self.last_token_s
        if isinstance(event, Finished | Rejected):
            self._open.discard(event.id)
        piece = choice.feed(event)
        if piece is not None and piece.finish and event.id in self._open:
            self._link.cancel(event.id)
        return piece


def _unavailable(event: Failed) -> ApiError:
    return ApiError(503, event.reason, code="engine_unavailable", retry_after_s=RETRY_AFTER_S)
