"""Answers in the two shapes of OpenAI's API, whole and as server-sent events."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from lockstep.engine.request import Logprobs
from lockstep.engine.text import REPLACEMENT, Tokenizer, decode, token_bytes
from lockstep.server import replies
from lockstep.server.errors import ApiError
from lockstep.server.stream import Choice, Piece, ScoredToken
from lockstep.server.tools import Call

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""OpenAI's value for a token that could not have been drawn; JSON has no minus infinity."""


def event(body: BaseModel) -> bytes:
    """One server-sent event."""
    return b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def failure(error: ApiError) -> bytes:
    """The last event of a stream that cannot go on."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


def usage(choices: Sequence[Choice], n: int) -> replies.Usage:
    """Tokens of all choices together; a prompt that was asked `n` times counts once."""
    prompts = choices[::n]
    prompt_tokens = sum(len(choice.request.prompt) for choice in prompts)
    completion_tokens = sum(choice.tokens for choice in choices)
    return replies.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=replies.PromptTokensDetails(
            cached_tokens=sum(choice.cached_tokens for choice in prompts)
        ),
        completion_tokens_details=replies.CompletionTokensDetails(
            reasoning_tokens=sum(choice.reasoning_tokens for choice in choices)
        ),
    )


class Spelling(NamedTuple):
    """One token by itself."""

    text: str
    bytes: list[int]
    name: str
    """As text completions know it: its text, or `bytes:\\xe4` where it is only part of a character."""


@lru_cache(maxsize=2**18)
def spelling(tokenizer: Tokenizer, token: int) -> Spelling:
    """Remembered for every token of a usual vocabulary: each is asked for again and again."""
    text, spelled = decode(tokenizer, [token]), token_bytes(tokenizer, token)
    partial = REPLACEMENT in text and spelled != text.encode()
    name = "bytes:" + repr(spelled)[2:-1] if partial else text
    return Spelling(text, list(spelled), name)


class Form(Protocol):
    """One of the two APIs."""

    id: str

    def opening(self, index: int) -> BaseModel | None: ...

    def chunk(self, piece: Piece) -> BaseModel: ...

    def closing(self, usage: replies.Usage) -> BaseModel: ...

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: replies.Usage) -> BaseModel: ...


class _Common:
    def __init__(self, tokenizer: Tokenizer, model: str, prefix: str, scored: bool) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())
        self._tokenizer = tokenizer
        self._scored = scored

    def _spelling(self, token: int) -> Spelling:
        return spelling(self._tokenizer, token)


class ChatForm(_Common):
    """`/v1/chat/completions`."""

    def __init__(self, tokenizer: Tokenizer, model: str, scored: bool) -> None:
        super().__init__(tokenizer, model, "chatcmpl", scored)
        self._calls: Counter[int] = Counter()

    def opening(self, index: int) -> replies.ChatChunk:
        return self._chunk(index, replies.Delta(role="assistant", content=""), None, None)

    def chunk(self, piece: Piece) -> replies.ChatChunk:
        delta = replies.Delta(content=piece.text) if piece.text else replies.Delta()
        if piece.thought:
            delta.reasoning_content = piece.thought
        if piece.calls:
            first = self._calls[piece.index]
            delta.tool_calls = [
                replies.ToolCallDelta(index=first + i, **_called(call)) for i, call in enumerate(piece.calls)
            ]
            self._calls[piece.index] += len(piece.calls)
        return self._chunk(piece.index, delta, self._logprobs(piece.scores), piece.finish)

    def closing(self, usage: replies.Usage) -> replies.ChatChunk:
        return replies.ChatChunk(**self._head("chat.completion.chunk"), choices=[], usage=usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: replies.Usage) -> replies.ChatCompletion:
        choices = [
            replies.ChatChoice(
                index=index,
                message=_message(own),
                logprobs=self._logprobs([score for p in own for score in p.scores]),
                finish_reason=own[-1].finish or "stop",
            )
            for index, own in enumerate(pieces)
        ]
        return replies.ChatCompletion(**self._head("chat.completion"), choices=choices, usage=usage)

    def _head(self, kind: str) -> replies.Head:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, delta: replies.Delta, logprobs: replies.ChatLogprobs | None, finish: str | None
    ) -> replies.ChatChunk:
        choice = replies.ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return replies.ChatChunk(**self._head("chat.completion.chunk"), choices=[choice])

    def _logprobs(self, scores: Sequence[ScoredToken]) -> replies.ChatLogprobs | None:
        if not self._scored:
            return None
        content = [self._scored_token(s.token, s.logprobs) for s in scores if s.logprobs is not None]
        return replies.ChatLogprobs(content=content)

    def _scored_token(self, token: int, own: Logprobs) -> replies.TokenLogprob:
        top = [self._top(other, logprob) for other, logprob in own.top]
        return replies.TokenLogprob(**dict(self._top(token, own.token)), top_logprobs=top)

    def _top(self, token: int, logprob: float) -> replies.TopLogprob:
        spelled = self._spelling(token)
        return replies.TopLogprob(token=spelled.text, logprob=finite(logprob), bytes=spelled.bytes)


def _message(pieces: Sequence[Piece]) -> replies.AssistantMessage:
    text = "".join(piece.text for piece in pieces)
    message = replies.AssistantMessage(role="assistant", content=text)
    if thought := "".join(piece.thought for piece in pieces):
        message.reasoning_content = thought
    if called := [replies.ToolCall(**_called(call)) for piece in pieces for call in piece.calls]:
        message.content, message.tool_calls = text or None, called
    return message


def _called(call: Call) -> dict[str, Any]:
    function = replies.CalledFunction(name=call.name, arguments=call.arguments)
    return {"id": call.id, "type": "function", "function": function}


class TextForm(_Common):
    """`/v1/completions`."""

    def __init__(self, tokenizer: Tokenizer, model: str, scored: bool) -> None:
        super().__init__(tokenizer, model, "cmpl", scored)

    def opening(self, index: int) -> None:
        return None

    def chunk(self, piece: Piece) -> replies.Completion:
        return replies.Completion(**self._head(), choices=[self._choice(piece.index, [piece])])

    def closing(self, usage: replies.Usage) -> replies.Completion:
        return replies.Completion(**self._head(), choices=[], usage=usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: replies.Usage) -> replies.Completion:
        choices = [self._choice(index, own) for index, own in enumerate(pieces)]
        return replies.Completion(**self._head(), choices=choices, usage=usage)

    def _head(self) -> replies.Head:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> replies.TextChoice:
        return replies.TextChoice(
            index=index,
            text="".join(piece.text for piece in pieces),
            logprobs=self._logprobs([score for piece in pieces for score in piece.scores]),
            finish_reason=pieces[-1].finish,
        )

    def _logprobs(self, scores: Sequence[ScoredToken]) -> replies.TextLogprobs | None:
        if not self._scored:
            return None
        return replies.TextLogprobs(
            tokens=[self._spelling(score.token).name for score in scores],
            token_logprobs=[finite(s.logprobs.token) if s.logprobs else None for s in scores],
            top_logprobs=[self._top(s.token, s.logprobs) if s.logprobs else None for s in scores],
            text_offset=[score.offset for score in scores],
        )

    def _top(self, drawn: int, own: Logprobs) -> dict[str, float]:
        """Always with the token drawn; of tokens that look alike, the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in [*own.top, (drawn, own.token)]:
            top.setdefault(self._spelling(token).name, finite(logprob))
        return top


def finite(logprob: float) -> float:
    """`logprob`, or OpenAI's stand-in for minus infinity."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
