"""From a command to its ranks: start them and wait, or find out that this process is one of them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import typer

from lockstep.cli.terminal import write
from lockstep.errors import UsageError
from lockstep.launch import launcher, names, planning
from lockstep.launch.hostfile import Hostfile
from lockstep.launch.job import Job
from lockstep.model.blas import prepare_blas
from lockstep.runtime.environment import RankEnvironment, is_rank
from lockstep.runtime.options import Deadlines, ModelOptions
from lockstep.runtime.place import Place
from lockstep.runtime.watchdog import Watchdog


@dataclass(frozen=True)
class Where:
    """Which ranks a command wants, and how they are started."""

    ranks: int | None = None
    hostfile: Path | None = None
    backend: str | None = None
    python: str | None = None
    env: list[str] | None = None
    cwd: str | None = None
    port: int | None = None
    dry_run: bool = False

    @property
    def alone(self) -> bool:
        """Whether this process can do it by itself, as it was started."""
        own = self.env is None and self.cwd is None and self.python is None
        return own and self.ranks in (None, 1) and self.hostfile is None and not self.dry_run

    def hosts(self) -> Hostfile:
        """Raises UsageError for a hostfile that is broken, and where there is no folder to run in."""
        try:
            Path.cwd()
        except FileNotFoundError as error:
            raise UsageError("the current folder has been removed: go to another one") from error
        return planning.hosts(self.ranks, self.hostfile)

    def check(self, hosts: Hostfile, options: ModelOptions) -> None:
        """Raises UsageError for what cannot be done as asked, before anything is started."""
        for text in sys.argv[1:]:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UsageError(f"the argument {text!a} is not UTF-8 text, as the ranks' must be")
        for text in self.env or []:
            if not text.partition("=")[0] or "=" not in text:
                raise UsageError(f"--env {text}: give NAME=VALUE")
        if any(names.is_local(host.ssh) for host in hosts.hosts):
            self._check_here()
        planning.check_backend(hosts, self._backend(hosts), options.parallel)
        planning.check(hosts, options)

    def _check_here(self) -> None:
        if self.cwd is not None and not Path(self.cwd).is_dir():
            raise UsageError(f"--cwd {self.cwd}: there is no such folder on this machine")
        if self.python is None:
            return
        path = str(Path(self.cwd or ".") / self.python) if os.sep in self.python else self.python
        if shutil.which(path) is None:
            raise UsageError(f"--python {self.python}: there is no such program on this machine")

    def _backend(self, hosts: Hostfile) -> str:
        return self.backend or hosts.backend or "ring"

    def job(self, hosts: Hostfile, stdin: bool | bytes, env: Mapping[str, str] = {}) -> Job:
        """This very command, once for each host."""
        return Job(
            argv=("-m", "lockstep", *sys.argv[1:]),
            hosts=hosts.hosts,
            backend=self._backend(hosts),
            env={**hosts.env, **dict(text.split("=", 1) for text in self.env or []), **env},
            cwd=self.cwd,
            python=self.python or sys.executable,
            port=self.port,
            stdin=stdin,
        )


def _alone(hosts: Hostfile, options: ModelOptions) -> Place:
    env, deadlines = RankEnvironment.read(os.environ), Deadlines.read(os.environ)
    blas = prepare_blas(env.local_size)
    # Before the watchdog starts, and with mlx: this downloads and converts the default model on first use.
    planning.check(hosts, options)
    return Place(env, blas, Watchdog(env.rank, deadlines))


def enter(where: Where, options: ModelOptions, stdin: bool | Callable[[], str] = False) -> Place:
    """This process's place among the ranks. Outside a run: start them, wait, and exit with their status.

    Rank 0 gets our standard input, or what `stdin` returns, which is called before any rank is started:
    ranks that wait for each other do not wait for a person. Raises UsageError when what is asked for cannot
    be done, before anything is started.
    """
    if is_rank(os.environ):
        return Place.take()
    hosts = where.hosts()
    if where.alone:
        return _alone(hosts, options)
    where.check(hosts, options)
    given = stdin().encode() if callable(stdin) and not where.dry_run else bool(stdin)
    job = where.job(hosts, given)
    if where.dry_run:
        write(launcher.dry_run(job) + "\n")
        raise typer.Exit(0)
    raise typer.Exit(launcher.run(job))
