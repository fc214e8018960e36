from __future__ import annotations

import asyncio

import pytest
from starlette.exceptions import HTTPException

from lockstep.server import limits
from lockstep.server.errors import ApiError
from lockstep.server.limits import BodyLimit, RateLimit


def test_each_client_has_its_own_requests_per_minute():
    limit = RateLimit(2)
    for client in ("a", "b", "a", "b"):
        limit.check(client)
    with pytest.raises(ApiError, match="More than 2 requests") as refusal:
        limit.check("a")
    assert refusal.value.status == 429
    assert 0 < (refusal.value.retry_after_s or 0) <= 60


def test_without_a_limit_everyone_may_come():
    limit = RateLimit(None)
    for _ in range(1000):
        limit.check("a")


def test_a_body_that_stops_half_way_is_given_up_and_an_open_connection_is_not(monkeypatch):
    monkeypatch.setattr(limits, "PATIENCE_S", 0.05)
    taken = []

    async def app(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            taken.append("a piece")

    async def ask(*messages):
        coming = iter(messages)

        async def receive():
            await asyncio.sleep(message if isinstance(message := next(coming), float) else 0)
            return message if isinstance(message, dict) else next(coming)

        await BodyLimit(app, max_bytes=100)({"type": "http", "headers": []}, receive, None)

    first = {"type": "http.request", "body": b"{", "more_body": True}
    last = {"type": "http.request", "body": b"}", "more_body": False}
    with pytest.raises(HTTPException) as refused:
        asyncio.run(ask(first, 60.0, last))
    assert refused.value.status_code == 408
    asyncio.run(ask(first, last, 0.5, {"type": "http.disconnect"}))
    assert taken == ["a piece"] * 3
