"""Run the `lockstep` command as a user would, and find what it left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from ranks import SOURCE, clean_env, mpi_env


@dataclass(frozen=True)
class Result:
    """How a command ended. `left` are the processes of this command that still run."""

    status: int
    stdout: str
    stderr: str
    left: list[psutil.Process]


def lockstep(
    *arguments: str,
    before: tuple[str, ...] = (),
    stdin: str | bytes = "",
    timeout_s: float = 90,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """`lockstep ARGUMENTS`, or `BEFORE lockstep ARGUMENTS`, with one BLAS thread per rank."""
    mark = uuid.uuid4().hex
    environment = clean_env()
    environment |= {k: v for k, v in mpi_env().items() if k not in ("LOCKSTEP_BACKEND", "MLX_MPI_LIBNAME")}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
        "PYTHONPATH": str(SOURCE),
        "OPENBLAS_NUM_THREADS": "1",
        "LOCKSTEP_TEST_MARK": mark,
        **(env or {}),
    }
    done = subprocess.run(
        [*before, sys.executable, "-m", "lockstep", *arguments],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=timeout_s,
        env=environment,
        cwd=cwd,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode(), marked_processes(mark))


def through(redirection: str) -> tuple[str, ...]:
    """A command that runs another one with this redirection."""
    return ("sh", "-c", f'exec "$@" {redirection}', "sh")


def marked_processes(mark: str) -> list[psutil.Process]:
    """The processes that inherited this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("LOCKSTEP_TEST_MARK") == mark
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # It ended, or is another user's, so not ours.
    return found
