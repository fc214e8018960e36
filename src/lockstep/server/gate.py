"""What every HTTP request passes first: it gets an id, is let in or not, and is logged and counted."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.observe.inference_log import RequestRecord
from lockstep.observe.metrics import Metrics
from lockstep.server.auth import OPEN_PATHS, Keys
from lockstep.server.errors import ApiError

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Record:
    """Gives the request its id, the client's own if it is sane, and writes the record when it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wished = Headers(scope=scope).get("x-request-id", "")
        request_id = wished if SANE_ID.fullmatch(wished) else uuid.uuid4().hex
        record = RequestRecord(request_id, scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        finally:
            record.route = getattr(scope.get("route"), "path", "unmatched")
            record.write()
            self._metrics.observe(record)


class Door:
    """Lets in the holders of a key; everyone if there are no keys."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            owner = self._keys.owner(Headers(scope=scope).get("authorization", ""))
            if owner is None:
                message = "This server needs an API key: `Authorization: Bearer KEY`."
                await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)
                return
            scope["state"]["record"].client = owner
        await self._app(scope, receive, send)
