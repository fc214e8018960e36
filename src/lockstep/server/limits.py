"""How much one client may ask for: bytes of a body, requests per minute."""

from __future__ import annotations

import asyncio
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.server.errors import ApiError

PATIENCE_S = 10.0
"""Between two pieces of a body: so long one that is half sent holds up the server's end."""


class BodyLimit:
    """Refuses a body of more than `max_bytes`, at its announcement or while it comes, and one that stops."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            error = ApiError(413, f"The body has {announced} bytes; at most {self._max_bytes} are taken.")
            await error.response()(scope, receive, send)
            return
        received, whole = 0, False

        async def counted() -> Message:
            nonlocal received, whole
            try:
                # Behind the body comes nothing but the end of the connection.
                message = await asyncio.wait_for(receive(), None if whole else PATIENCE_S)
            except TimeoutError as error:
                raise HTTPException(408, f"Nothing of the body came for {PATIENCE_S:g} s.") from error
            whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, f"The body has more than {self._max_bytes} bytes.")
            return message

        await self._app(scope, counted, send)


class RateLimit:
    """Requests per minute, for each client by itself, over a moving window."""

    def __init__(self, requests_per_minute: int | None) -> None:
        self._limit = RateLimitItemPerMinute(requests_per_minute) if requests_per_minute else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, client: str) -> None:
        """Count one request of `client`. Raises `ApiError` 429 with the time to wait."""
        if self._limit is None or self._limiter.hit(self._limit, client):
            return
        reset_s = self._limiter.get_window_stats(self._limit, client).reset_time
        message = f"More than {self._limit.amount} requests in a minute."
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=reset_s - time.time())
