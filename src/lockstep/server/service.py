"""One request from its prompt tokens to its answer, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lockstep.engine.text import Tokenizer, decode
from lockstep.observe.inference_log import RequestRecord
from lockstep.server import render, replies
from lockstep.server.errors import ApiError
from lockstep.server.examine import Question
from lockstep.server.examiner import Examiner
from lockstep.server.limits import RateLimit
from lockstep.server.link import FrontLink
from lockstep.server.openai import GenerationRequest
from lockstep.server.prompts import Room, engine_requests, grammar, unfollowable
from lockstep.server.reasoning import reasoning
from lockstep.server.settings import ServerSettings
from lockstep.server.stream import RETRY_AFTER_S, Answer, Piece, choices
from lockstep.server.tools import tool_calls

REFUSAL_PATIENCE_S = 0.5
CLIENT_CLOSED_REQUEST = 499
Made = TypeVar("Made")
FEW_SCORES = 256
"""As many are rendered in a moment."""


@dataclass
class Service:
    """What the routes share."""

    settings: ServerSettings
    tokenizer: Tokenizer
    link: FrontLink
    served_name: str
    max_context: int
    """By the model's configuration; the engine may have room for less."""
    rate_limit: RateLimit
    beside: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "beside"))
    """For what would hold up other clients' tokens: long prompts, and their probabilities."""
    examiner: Examiner = field(default_factory=Examiner)

    @property
    def room(self) -> Room:
        info = self.link.info
        max_context = min(info.max_context, self.max_context) if info else self.max_context
        return Room(
            vocab_size=info.vocab_size if info else len(self.tokenizer),
            max_context=max_context,
            max_prompt_tokens=self.settings.max_prompt_tokens or max_context,
            default_max_tokens=self.settings.default_max_tokens,
        )

    def check_model(self, name: str | None) -> None:
        """The served id, its last part and `default` all mean the one model there is."""
        if name not in (None, self.served_name, Path(self.served_name).name, "default"):
            message = f"The model {name!r} does not exist here; this server has {self.served_name!r}."
            raise ApiError(404, message, code="model_not_found", param="model")

    def _admit(self, record: RequestRecord, request: Request, answers: int) -> None:
        """Raises `ApiError`: 429 if one client or all together ask for too much, 400 if it is for ever."""
        self.rate_limit.check(record.client or (request.client.host if request.client else ""))
        limit = self.settings.max_requests
        if info := self.link.info:
            limit = min(limit, info.max_requests)
        if answers > limit:
            message = (
                f"The prompts times n are {answers} answers and at most {limit} are possible: ask for fewer."
            )
            raise ApiError(400, message, param="n")
        if self.link.unfinished + answers > limit:
            message = f"{self.link.unfinished} answers are unfinished and at most {limit} may be."
            raise ApiError(429, message, code="queue_full", retry_after_s=RETRY_AFTER_S)

    async def _aside(self, make: Callable[[], Made]) -> Made:
        """Run `make` beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.beside, make)

    async def _grammar(self, body: GenerationRequest) -> str:
        """What the text of each answer has to match, which the engine can follow."""
        made = await self._aside(lambda: grammar(self.tokenizer, body))
        ends = sorted(self.tokenizer.eos_token_ids)
        question = Question(made, self.tokenizer.name_or_path, self.room.vocab_size, ends)
        if reason := await self.examiner.refusal(question):
            raise unfollowable(body, reason)
        return made

    async def reply(
        self,
        request: Request,
        body: GenerationRequest,
        tokens: Callable[[], Sequence[list[int]]],
        form: render.Form,
    ) -> Response:
        """Generate from the prompts' `tokens`, which are made beside the event loop, and reply in `form`.

        Drops what the client does not wait for, here and on the engine.
        """
        self.check_model(body.model)
        self._admit(request.state.record, request, body.prompt_count * body.answers)
        return await _unless_disconnected(request, self._answer(request, body, tokens, form))

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        tokens: Callable[[], Sequence[list[int]]],
        form: render.Form,
    ) -> Response:
        record: RequestRecord = request.state.record
        prompts = await self._aside(tokens)
        text = await self._grammar(body) if body.is_constrained else ""
        eos_tokens = self.tokenizer.eos_token_ids
        requests = [
            r for prompt in prompts for r in engine_requests(body, prompt, self.room, eos_tokens, text)
        ]
        record.stream = bool(body.stream)
        if self.settings.log_prompts:
            record.prompt = "\n".join(decode(self.tokenizer, prompt) for prompt in prompts)
        answer = Answer(
            self.link,
            choices(
                self.tokenizer,
                requests,
                body.stop_strings,
                echo=body.echoes,
                shown_tokens=0 if body.token_limit == 0 else None,
                continues=body.continues_prompt,
                tools=partial(tool_calls, self.tokenizer, body.callable_tools, body.most_calls),
                reasoning=partial(reasoning, self.tokenizer) if body.may_think else lambda prompt: None,
            ),
            self.beside,
        )
        exchange = _Exchange(answer, form, record, body, self.settings.keepalive_s, self.beside)
        if not body.stream:
            return await exchange.whole()
        try:
            await answer.begin(REFUSAL_PATIENCE_S)
        except BaseException:
            exchange.end()
            raise
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(exchange.events(), media_type="text/event-stream", headers=headers)


@dataclass
class _Exchange:
    answer: Answer
    form: render.Form
    record: RequestRecord
    request: GenerationRequest
    keepalive_s: float
    beside: Executor

    async def whole(self) -> Response:
        pieces: list[list[Piece]] = [[] for _ in self.answer.choices]
        try:
            async with aclosing(self.answer.pieces(self.keepalive_s)) as batches:
                async for batch in batches:
                    for piece in batch:
                        pieces[piece.index].append(piece)
            usage = self._usage()
            body = await self._render(
                [piece for own in pieces for piece in own],
                lambda: self.form.whole(pieces, usage).model_dump_json(exclude_unset=True).encode(),
            )
        finally:
            self.end()
        return Response(body, media_type="application/json")

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; a failure becomes the last of them."""
        try:
            opening = [self.form.opening(choice.index) for choice in self.answer.choices]
            yield b"".join(render.event(chunk) for chunk in opening if chunk) or render.KEEP_ALIVE
            async with aclosing(self.answer.pieces(self.keepalive_s)) as batches:
                async for batch in batches:
                    yield await self._render(batch, partial(self._chunks, batch)) or render.KEEP_ALIVE
            if self.request.include_usage:
                yield render.event(self.form.closing(self._usage()))
            yield render.DONE
        except ApiError as error:
            self.record.error = error.message
            yield render.failure(error)
        finally:
            self.end()

    async def _render(self, pieces: Sequence[Piece], make: Callable[[], bytes]) -> bytes:
        if sum(len(piece.scores) for piece in pieces) <= FEW_SCORES:
            return make()
        return await asyncio.get_running_loop().run_in_executor(self.beside, make)

    def _chunks(self, pieces: Sequence[Piece]) -> bytes:
        return b"".join(render.event(self.form.chunk(piece)) for piece in pieces)

    def _usage(self) -> replies.Usage:
        return render.usage(self.answer.choices, self.request.answers)

    def end(self) -> None:
        """Free what the engine still holds, and note what this has cost."""
        answer, record = self.answer, self.record
        answer.close()
        usage = self._usage()
        record.prompt_tokens = usage.prompt_tokens
        record.cached_tokens = usage.prompt_tokens_details.cached_tokens
        record.completion_tokens = usage.completion_tokens
        queued = (choice.queue_s for choice in answer.choices)
        record.queue_s = max((queue_s for queue_s in queued if queue_s is not None), default=None)
        record.finish = ",".join(choice.finish or "disconnected" for choice in answer.choices)
        if answer.first_token_s is not None and answer.last_token_s is not None:
            record.ttft_s = answer.first_token_s - record.began_s
            if usage.completion_tokens > 1:
                record.tpot_s = (answer.last_token_s - answer.first_token_s) / (usage.completion_tokens - 1)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do `work`, but drop it as soon as the client has gone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
