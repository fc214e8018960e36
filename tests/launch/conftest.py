"""A launcher in a process of its own, so that it can be interrupted, killed and measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lockstep.launch.writer import Writer

SOURCE = Path(__file__).parent.parent.parent / "src"

LAUNCHER = """
import json, sys
from lockstep.launch.hostfile import Host, local_hosts
from lockstep.launch.job import Job
from lockstep.launch.launcher import run
job = json.loads(sys.argv[1])
job["hosts"] = [Host(**host) for host in job["hosts"]] if "hosts" in job else local_hosts(job.pop("n"))
job["argv"] = tuple(job["argv"])
sys.exit(run(Job(**job)))
"""


@dataclass
class Launched:
    """A running launcher and everything it has started (found by a variable that all of them inherit)."""

    process: subprocess.Popen[str]
    mark: str

    def finish(self, timeout_s: float = 20, given: str | None = None) -> tuple[int, str, str]:
        out, err = self.process.communicate(given, timeout_s)
        return self.process.returncode, out, err

    def await_members(self, count: int, timeout_s: float = 5) -> None:
        """A child that has been forked a moment ago shows its environment only once it has been executed."""
        deadline = time.monotonic() + timeout_s
        while len(self.members()) != count:
            assert time.monotonic() < deadline, f"{len(self.members())} processes instead of {count}"
            time.sleep(0.05)

    def members(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("TEST_MARK") == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def await_silence(self, timeout_s: float = 5) -> None:
        """Fail unless every process has ended within the time."""
        deadline = time.monotonic() + timeout_s
        while left := self.members():
            assert time.monotonic() < deadline, f"left behind: {[p.cmdline()[-2:] for p in left]}"
            time.sleep(0.05)

    def await_lines(self, count: int, stream: str = "stderr") -> list[str]:
        """The next lines of a stream, as soon as they are there."""
        pipe = getattr(self.process, stream)
        return [pipe.readline() for _ in range(count)]


Launch = Callable[..., Launched]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start a launcher for `n` local ranks (or `hosts`) that run a Python program.

    `through` is a command that starts the launcher, such as nohup.
    """
    started: list[Launched] = []

    def start(
        program: str,
        n: int = 2,
        env: dict[str, str] | None = None,
        through: tuple[str, ...] = (),
        **options: object,
    ) -> Launched:
        mark = uuid.uuid4().hex
        job = {"argv": ["-c", program], "env": options.pop("job_env", {}), **options}
        job |= {} if "hosts" in options else {"n": n}
        own = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OMPI_", "PMI", "LOCKSTEP_"))}
        process = subprocess.Popen(
            [*through, sys.executable, "-c", LAUNCHER, json.dumps(job)],
            env=own | {"PYTHONPATH": str(SOURCE), "TEST_MARK": mark} | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(Launched(process, mark))
        return started[-1]

    yield start
    for launched in started:
        for process in launched.members():
            with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended by itself.
                process.send_signal(signal.SIGKILL)
        for pipe in (launched.process.stdin, launched.process.stdout, launched.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        launched.process.wait(10)


@pytest.fixture(scope="module")
def nowhere() -> Iterator[Writer]:
    """A writer whose lines nobody sees."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    nowhere = Writer(descriptor)
    yield nowhere
    nowhere.flush()
    os.close(descriptor)
