"""The front process: `python -m lockstep.server.front`, with LOCKSTEP_SERVER and LOCKSTEP_LINK set.

It has the tokenizer and no model. SIGTERM drains, a second signal ends at once. With `--spare` it loads all
that it needs and then waits until it is told, on its standard input, to serve in place of one that has died.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

import msgspec
import uvicorn

from lockstep.engine.text import load_tokenizer
from lockstep.engine.wire import ENVIRONMENT as LINK_ENVIRONMENT
from lockstep.engine.wire import LinkConfig, link_from_environment
from lockstep.errors import LockstepError, UsageError, complaint
from lockstep.model import checkpoint
from lockstep.model.costs import max_context
from lockstep.observe import logging
from lockstep.runtime.beats import INTERVAL_S, Beat
from lockstep.runtime.verdict import LOADING_SILENCE_S
from lockstep.server.app import create_app
from lockstep.server.auth import Keys, load_keys
from lockstep.server.limits import RateLimit
from lockstep.server.link import FrontLink
from lockstep.server.listening import check_certificate, listen
from lockstep.server.notice import SPARE, Notice, read_notices, wait_for_turn
from lockstep.server.service import Service
from lockstep.server.settings import ServerSettings, settings_from_environment

DRAIN_MARGIN_S = 2


def main() -> int:
    """Serve until told to stop; returns the exit status."""
    try:
        settings = settings_from_environment()
        link = link_from_environment()
        if link is None:
            raise UsageError(f"{LINK_ENVIRONMENT} is not set: `lockstep serve` starts this process")
        return serve(settings, link, spare=SPARE in sys.argv[1:])
    except LockstepError as error:
        sys.stderr.write(f"{complaint(str(error))}\n")
        return error.exit_status


def serve(settings: ServerSettings, link: LinkConfig, spare: bool = False) -> int:
    """Listen, load the tokenizer, and answer. Raises `UsageError` before anything is loaded if it cannot.

    A `spare` process loads first, and listens when its turn has come.
    """
    logging.configure(settings.log_format, settings.log_level)
    keys = Keys(load_keys(settings))
    check_certificate(settings)
    listener = None if spare else listen(settings.host, settings.port)
    beat = Beat.read(os.environ)
    with beat.meanwhile(LOADING_SILENCE_S, settings.load_timeout_s):
        folder = checkpoint.resolve(settings.model or None)
        tokenizer = load_tokenizer(folder)
    if listener is None:
        with beat.meanwhile():
            begin = wait_for_turn()
        if not begin:
            return 0
        listener = listen(settings.host, settings.port)
    settings = msgspec.structs.replace(settings, port=listener.getsockname()[1])
    service = Service(
        settings=settings,
        tokenizer=tokenizer,
        link=FrontLink(link, settings.recovery_timeout_s),
        served_name=settings.served_name or settings.model or folder.name,
        max_context=settings.max_context or max_context(checkpoint.config(folder)),
        rate_limit=RateLimit(settings.requests_per_minute),
    )

    server = _Server(settings, service, uvicorn_config(settings, create_app(service, keys)), beat)
    asyncio.run(server.run_on(listener))
    return 0


def uvicorn_config(settings: ServerSettings, app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.ssl_certfile or None,
        ssl_keyfile=settings.ssl_keyfile or None,
        timeout_graceful_shutdown=round(settings.drain_timeout_s) + DRAIN_MARGIN_S,
    )


class _Server(uvicorn.Server):
    def __init__(
        self, settings: ServerSettings, service: Service, config: uvicorn.Config, beat: Beat
    ) -> None:
        super().__init__(config)
        self._beat = beat
        self._settings = settings
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_on(self, listener: socket.socket) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._service.link.listen()
        read_notices(lambda notice: loop.call_soon_threadsafe(self._take_notice, notice))
        async with asyncio.TaskGroup() as tasks:
            beside = [self._service.link.run(), self._announce(), self._show_life()]
            running = [tasks.create_task(work) for work in beside]
            await self.serve(sockets=[listener])
            for task in running:
                task.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once; either way the exit status is 0."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        assert self._loop is not None
        timeout_s = 0.0 if self.force_exit else self._settings.drain_timeout_s
        self._loop.call_later(timeout_s, self._service.link.fail_all, "The server is shutting down.")

    def _take_notice(self, notice: Notice) -> None:
        if notice.drain:
            self.handle_exit(signal.SIGTERM, None)
            return
        self._service.link.tell_away(notice.reason)
        if notice.ending:
            self._service.link.fail_all(f"The engine has ended: {notice.reason}.")
            self.handle_exit(signal.SIGTERM, None)

    async def _announce(self) -> None:
        await self._service.link.recovered.wait()
        sys.stderr.write(f"Lockstep serves {self._service.served_name} at {self._settings.url}\n")
        sys.stderr.flush()

    async def _show_life(self) -> None:
        """To whoever started this process, and never outlive it."""
        parent = os.getppid()
        while os.getppid() == parent:
            self._beat()
            await asyncio.sleep(INTERVAL_S)
        self.force_exit = self.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
