"""The routes."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lockstep import __version__
from lockstep.observe.metrics import Metrics
from lockstep.server import errors, replies
from lockstep.server.auth import Keys
from lockstep.server.errors import ApiError
from lockstep.server.gate import Door, Record
from lockstep.server.limits import BodyLimit
from lockstep.server.openai import ChatRequest, CompletionRequest
from lockstep.server.prompts import chat_tokens, text_tokens
from lockstep.server.render import ChatForm, TextForm
from lockstep.server.service import Service

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ErrorReply} for status in (400, 401, 404, 413, 429, 500, 503)
}


def create_app(service: Service, keys: Keys) -> FastAPI:
    """The whole HTTP side."""
    link = service.link
    metrics = Metrics(lambda: (link.available, link.restarts, link.status))
    app = FastAPI(title="Lockstep", version=__version__, responses=FAILURES)
    errors.install(app)
    # Added from the inside to the outside.
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes)
    app.add_middleware(Door, keys=keys)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            # OpenAI's client for web pages sends a dozen headers of its own.
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Record, metrics=metrics)
    _add_openai_routes(app, service)
    _add_state_routes(app, service, metrics)
    return app


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    tokenizer, name = service.tokenizer, service.served_name
    created = int(time.time())

    @app.post("/v1/chat/completions", response_model=replies.ChatCompletion)
    async def chat(body: ChatRequest, request: Request) -> Response:
        form = ChatForm(tokenizer, name, scored=body.alternatives is not None)
        return await service.reply(request, body, lambda: [chat_tokens(tokenizer, body, service.room)], form)

    @app.post("/v1/completions", response_model=replies.Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        form = TextForm(tokenizer, name, scored=body.alternatives is not None)
        return await service.reply(
            request, body, lambda: [text_tokens(tokenizer, p, service.room) for p in body.prompts], form
        )

    def the_model() -> replies.Model:
        return replies.Model(id=name, created=created, max_context=service.room.max_context)

    @app.get("/v1/models")
    async def models() -> replies.ModelList:
        return replies.ModelList(data=[the_model()])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> replies.Model:
        service.check_model(model)
        return the_model()


def _add_state_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    link = service.link

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the front process lives; says nothing about the engine."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether the model is loaded and the ring whole."""
        if not link.available:
            raise ApiError(503, f"Not ready: {link.reason}.", code="not_ready", retry_after_s=1)
        return {"status": "ready"}

    @app.get("/cluster/status", response_model=dict[str, Any])
    async def cluster_status() -> Response:
        """Every rank as rank 0 last told of it."""
        status: dict[str, Any] = msgspec.to_builtins(link.status) if link.status else {"ranks": []}
        status |= {
            "model": service.served_name,
            "ready": link.available,
            "reason": status.get("reason", "") if link.available else link.reason,
            "restarts": max(link.restarts, status.get("restarts", 0)),
            "unfinished": link.unfinished,
        }
        return JSONResponse(status)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
