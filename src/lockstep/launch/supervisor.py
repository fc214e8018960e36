"""Keeps a server up: the front process once, the ranks as often as needed."""

from __future__ import annotations

import queue
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from types import FrameType

from lockstep.launch import launcher, names
from lockstep.launch.hostfile import Host
from lockstep.launch.job import Job

FRONT = ("-m", "lockstep.server.front")


DEFAULT_LINK_PORT = 32300
"""Of a front process on another machine, whose free ports are not known here."""


def link_port(host: Host) -> int:
    """A port on rank 0's host where front process and rank 0 can meet."""
    if not names.is_local(host.ssh):
        return DEFAULT_LINK_PORT
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Supervisor:
    """Runs the front process and the ranks of `job` until one of them ends or a signal comes."""

    def __init__(self, job: Job, front_env: Mapping[str, str]) -> None:
        """`front_env` is for the front process alone; it runs on rank 0's host."""
        self._job = job
        self._front_job = replace(
            job, argv=FRONT, hosts=job.hosts[:1], backend="ring", env={**job.env, **front_env}, stdin=False
        )
        self._ended: queue.SimpleQueue[launcher.Outcome] = queue.SimpleQueue()

    def run(self) -> int:
        """The exit status: 0 after a signal, otherwise that of the process that ended."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        front = launcher.start(self._front_job)
        ranks = launcher.start(self._job)
        try:
            for running in (front, ranks):
                threading.Thread(target=lambda r=running: self._ended.put(r.wait()), daemon=True).start()
            outcome = self._ended.get()
            ranks.explain(outcome)
            return outcome.status
        finally:
            ranks.end()
            front.end()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._ended.put(launcher.Outcome(0))
