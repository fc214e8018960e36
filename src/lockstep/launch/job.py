"""What to start: the ranks' program, hosts and backend, and the commands that this comes down to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from lockstep.launch.hostfile import Host


@dataclass(frozen=True)
class Job:
    """One run. `argv` are arguments for Python, such as ("-m", "lockstep", "generate", "Hello").

    `env` is set on every rank, over what the launcher forwards. `cwd` None means the launcher's folder, or
    the home folder on a machine that lacks it. `port` is the first port of the data plane; None takes free
    ports for ranks of this machine and 32323 otherwise. `stdin`: hand our standard input, or these bytes, to
    rank 0; `fed`: it gets what is given to `Running.feed` instead. `heard`: rank 0's standard error passes
    through us, so that its reason for ending is known. `first_beat_s`: a job of one process shows by beats
    (see runtime/beats.py) that it is alive, the first of them within that time; inf: it makes none.
    """

    argv: tuple[str, ...]
    hosts: tuple[Host, ...]
    backend: str = "ring"
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    python: str = sys.executable
    port: int | None = None
    stdin: bool | bytes = True
    fed: bool = False
    heard: bool = False
    first_beat_s: float = inf
    ssh: tuple[str, ...] = ("ssh",)
    mpirun: str | None = None

    @property
    def folder(self) -> str:
        return self.cwd or str(Path.cwd())

    @property
    def reads(self) -> bool:
        """Whether rank 0 gets any input."""
        return self.fed or bool(self.stdin)


@dataclass(frozen=True)
class Command:
    """One process to start: a rank, or `mpirun` for all of them (then `rank` is None).

    `files` maps an environment variable to the text of the file whose path it shall hold; `ports` are
    addresses that the process will listen on.
    """

    rank: int | None
    host: Host
    remote: bool
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[tuple[str, int], ...] = ()
