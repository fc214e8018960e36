"""Programs under test: pinned to cores, with deadlines, and stopped whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from common import machine

STOP_S = 15.0
"""For a program to end when asked; then it is killed."""

LAUNCH_VARIABLES = ("MLX_", "OMPI_", "PMI", "PMIX_", "PRTE_", "LOCKSTEP_", "NCCL_")


class BenchmarkError(RuntimeError):
    """A program under test did not do its part."""


def environment(threads: int = 1) -> dict[str, str]:
    """Ours, without what belongs to another run; the BLAS has `threads` threads."""
    kept = ("LOCKSTEP_CACHE",)
    env = {k: v for k, v in os.environ.items() if k in kept or not k.startswith(LAUNCH_VARIABLES)}
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    paths = [str(machine.ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    mpi = {
        f"{kind}_ALLOW_RUN_AS_ROOT{suffix}": "1" for kind in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")
    }
    return (
        env
        | mpi
        | dict.fromkeys(names, str(threads))
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )


def pinned_python(folder: Path, instead_of_m: Path | None = None, core: int = 0) -> Path:
    """A stand-in for Python that runs each rank on one core of its own, whoever starts the rank.

    Rank 0 gets the one with that number. `instead_of_m` is a program to run where `-m lockstep...` is asked
    for. Without `taskset` (macOS) the choice of the core is left to the system.
    """
    available = machine.cores()
    choices = " ".join(str(core) for core in available)
    pin = "taskset -c $core " if shutil.which("taskset") else ""
    script = folder / f"python{core or ''}"
    replaced = f'case $1$2 in -mlockstep*) shift; set -- {instead_of_m} "$@";; esac' if instead_of_m else ""
    lines = [
        "#!/bin/sh",
        replaced,
        "rank=${MLX_RANK:-${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}}",
        f"place=$(((rank + {core}) % {len(available)} + 1))",
        f"core=$(echo {choices} | cut -d' ' -f$place)",
        f'exec {pin}"{sys.executable}" "$@"',
    ]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    return script


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Program:
    """A started program and everything that it started. A context manager: it never outlives its block."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        self.argv = [*prefix, *argv]
        self._log = tempfile.NamedTemporaryFile(mode="w+", suffix=".log")  # noqa: SIM115
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            self.argv,
            env=environment() if env is None else dict(env),
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdin else self._log,
            stderr=self._log,
            # Not a session, as in src/lockstep/launch/process.py: ranks on all cores would keep us off them.
            process_group=0,
            text=True,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def tail(self, lines: int = 12) -> str:
        """The last lines that it said."""
        self._log.seek(0)
        return "".join(self._log.readlines()[-lines:])

    def tree(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """Freeze all of it: a peer that waits in a collective would burn the cores of the others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def cpu_s(self) -> dict[int, float]:
        """CPU seconds so far of each of its processes."""
        spent = {}
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent[process.pid] = times.user + times.system
        return spent

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises BenchmarkError when it is late."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{self.argv} still runs after {timeout_s:g} s:\n{self.tail()}") from None

    def ask(self, line: str, timeout_s: float) -> str:
        """Say a line to it, and return the line that it answers."""
        self.tell(line)
        return self.listen(timeout_s)

    def tell(self, line: str) -> None:
        """Say a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def listen(self, timeout_s: float) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        answer = ""
        fd = self.process.stdout.fileno()
        os.set_blocking(fd, False)
        while not answer.endswith("\n"):
            running = self.running
            answer += self.process.stdout.readline()
            if answer.endswith("\n"):
                break
            if time.monotonic() > deadline_s or not running:
                raise BenchmarkError(f"{self.argv} did not answer within {timeout_s:g} s:\n{self.tail()}")
            time.sleep(0.02)
        return answer.strip()

    def stop(self) -> None:
        """End it and all that it started."""
        self.resume()
        tree = self.tree()
        if self.running:
            self.process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=STOP_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        self.process.wait(5)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
