"""Starting ranks through `mpirun`: which one, of which maker, and its command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lockstep.errors import LockstepError, UsageError
from lockstep.launch import names
from lockstep.launch.job import Command, Job
from lockstep.runtime import libmpi

MPI_RANK = ("-m", "lockstep.launch.mpi_rank")
REMEDY = 'install one with `pip install "mlx-lockstep[mpi]"`, or use --backend ring'


@dataclass(frozen=True)
class Mpirun:
    """An `mpirun`: `maker` is "openmpi" or "mpich"."""

    path: str
    maker: str
    version: tuple[int, ...]


def find(path: str | None = None) -> Mpirun:
    """The `mpirun` at `path`, beside this Python, or on PATH. Raises LockstepError when there is none."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    found = shutil.which(path or "mpirun", path=os.pathsep.join(folders))
    if found is None:
        raise LockstepError(f"{path or 'mpirun'} not found: {REMEDY}")
    try:
        shown = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LockstepError(f"{found} --version does not work ({error}): {REMEDY}") from error
    return Mpirun(found, *flavour(found, shown.stdout + shown.stderr))


def flavour(path: str, text: str) -> tuple[str, tuple[int, ...]]:
    """Maker and version from what `mpirun --version` prints."""
    for maker, pattern in (
        ("openmpi", r"\(Open MPI\)\s+(\d[\d.]*)"),
        ("mpich", r"HYDRA[\s\S]*?Version:\s+(\d[\d.]*)|MPICH Version:\s+(\d[\d.]*)"),
    ):
        if found := re.search(pattern, text):
            version = next(group for group in found.groups() if group)
            return maker, tuple(int(part) for part in version.split(".") if part)
    first = text.strip().splitlines()[0] if text.strip() else "nothing"
    raise LockstepError(f"{path} is neither Open MPI nor MPICH (it says {first!r}): {REMEDY}")


def library(mpirun: Mpirun) -> str | None:
    """Path of the libmpi that belongs to `mpirun`; None when it is not in its prefix."""
    prefixes = (Path(mpirun.path).parent.parent, Path(mpirun.path).resolve().parent.parent)
    return next(filter(None, map(libmpi.find, prefixes)), None)


def command(job: Job, common: Mapping[str, str]) -> Command:
    """One `mpirun` that starts every rank. Raises LockstepError when mpirun or its library is missing.

    Raises UsageError when it cannot start the ranks where they are wanted, or hand rank 0 its input there.
    """
    if job.reads and not names.is_local(job.hosts[0].ssh):
        raise UsageError(
            f"mpirun cannot hand our standard input to rank 0 on {job.hosts[0].ssh}: make this machine the "
            "first of the hostfile, or use --backend ring"
        )
    mpirun = find(job.mpirun)
    remote = not all(names.is_local(host.ssh) for host in job.hosts)
    own = _mpi_env(job, mpirun, common)
    own = {name: value for name, value in own.items() if name not in os.environ}
    env = {**common, **own}
    if any(host.memory_gb is not None for host in job.hosts):
        env["LOCKSTEP_MEMORY_GB"] = ",".join(str(host.memory_gb or "") for host in job.hosts)
    argv = [mpirun.path, *_options(job, mpirun)]
    if remote:
        # Open MPI warns of a variable that is not set, which would pass for the reason of a failure.
        by_agent = ["LOCKSTEP_LIFELINE_FIFO", *(["LOCKSTEP_STDIN_FIFO"] if job.reads else [])]
        argv += _exports(mpirun, sorted({*env, *by_agent}))
    return Command(None, job.hosts[0], False, (*argv, job.python, *MPI_RANK, job.python, *job.argv), env)


def _options(job: Job, mpirun: Mpirun) -> list[str]:
    size, places = str(len(job.hosts)), _places(job)
    if mpirun.maker == "mpich":
        hosts = [] if places is None else ["-hosts", ",".join(f"{host}:{n}" for host, n in places)]
        return ["-n", size, *hosts, *(["-wdir", job.cwd] if job.cwd else [])]
    hosts = [] if places is None else ["--host", ",".join(f"{host}:{n}" for host, n in places)]
    folder = ["--wdir", job.cwd] if job.cwd else []
    # Open MPI would bind each rank to one core, and its BLAS threads with it.
    if mpirun.version >= (5,):
        raw = ["--output", ":raw"]
        return ["-n", size, *hosts, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *raw, *folder]
    return ["-n", size, *hosts, "--oversubscribe", "--bind-to", "none", *folder]


def _places(job: Job) -> list[tuple[str, int]] | None:
    """Hosts with their number of ranks, in rank order; None when all are here."""
    if all(names.is_local(host.ssh) for host in job.hosts):
        return None
    places: list[tuple[str, int]] = []
    for host in job.hosts:
        if places and places[-1][0] == host.ssh:
            places[-1] = (host.ssh, places[-1][1] + 1)
        elif any(name == host.ssh for name, _ in places):
            raise UsageError(
                f"mpirun gives each host consecutive ranks: put the entries of {host.ssh} together"
            )
        else:
            places.append((host.ssh, 1))
    return places


def _mpi_env(job: Job, mpirun: Mpirun, common: Mapping[str, str]) -> dict[str, str]:
    env = {}
    if libmpi.VARIABLE not in common:
        found = library(mpirun)
        if found is None:
            raise LockstepError(
                f"no libmpi beside {mpirun.path}: set {libmpi.VARIABLE} to its path, or {REMEDY}"
            )
        env[libmpi.VARIABLE] = found
    if mpirun.maker != "openmpi":
        return env
    if os.geteuid() == 0:
        kinds = ("OMPI", "PRTE")
        env |= {f"{k}_ALLOW_RUN_AS_ROOT{suffix}": "1" for k in kinds for suffix in ("", "_CONFIRM")}
    return env


def _exports(mpirun: Mpirun, variables: list[str]) -> list[str]:
    """Hand variables of mpirun's environment to other machines by name: values would show in `ps`."""
    if mpirun.maker == "mpich":
        return ["-genvlist", ",".join(variables)]
    return [part for name in variables for part in ("-x", name)]
