"""The servers that are measured: how each is started, and kept quiet while another one is measured."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.processes import BenchmarkError, Program, free_port
from lockstep.bench.client import Ask, Endpoint, ask

PROGRAMS = Path(__file__).resolve().parents[1] / "programs"
READY_S = 120.0


@dataclass(frozen=True)
class Contestant:
    """A server to be measured. `quiet` tells what to freeze while others run: "all", "launcher" or "none"."""

    label: str
    ranks: int
    argv: Sequence[str]
    quiet: str = "none"
    differs: str = ""
    port: int = field(default_factory=free_port)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.port}")


def ours(
    model: Path,
    python: Path,
    ranks: int,
    backend: str = "ring",
    parallel: str = "pipeline",
    options: Sequence[str] = (),
) -> Contestant:
    """`lockstep serve` under its own launcher."""
    port = free_port()
    argv = [sys.executable, "-m", "lockstep", *_serve(model, port, ranks, parallel), "-n", str(ranks)]
    if ranks > 1:
        argv += ["--backend", backend]
    argv += ["--python", str(python), *options]
    label = f"lockstep, {_form(ranks, parallel, backend)}"
    return Contestant(label, ranks, argv, differs=" ".join(options), port=port)


def ours_under_mlx_launch(model: Path, python: Path, ranks: int, parallel: str = "pipeline") -> Contestant:
    """`lockstep serve` under mlx's launcher, which is frozen while others run because it polls."""
    port = free_port()
    argv = [str(Path(sys.executable).parent / "mlx.launch"), "-n", str(ranks), "--backend", "ring"]
    argv += ["-p", str(_free_ports_from()), "--", str(python), "-m", "lockstep"]
    argv += _serve(model, port, ranks, parallel)
    form = _form(ranks, parallel, "ring")
    return Contestant(f"lockstep, {form}, mlx.launch", ranks, argv, quiet="launcher", port=port)


def mlx_lm_server(
    model: Path, python: Path, ranks: int, backend: str = "mpi", parallel: str = ""
) -> Contestant:
    """`mlx_lm.server` under our launcher: mlx's own costs it a core."""
    port = free_port()
    program = [str(PROGRAMS / "mlx_lm_server.py"), "--model", str(model), "--port", str(port)]
    program += ["--log-level", "WARNING", *(["--pipeline"] if parallel == "pipeline" else [])]
    argv = start_ranks(python, backend, ranks, program)
    label = f"mlx_lm.server, {_form(ranks, parallel, backend)}"
    return Contestant(label, ranks, argv, quiet="all", port=port)


def start_ranks(python: Path, backend: str, ranks: int, argv: Sequence[str]) -> list[str]:
    """The command that starts Python with `argv` as ranks, by our launcher alone."""
    return [sys.executable, str(PROGRAMS / "start_ranks.py"), backend, str(ranks), str(python), *argv]


def _serve(model: Path, port: int, ranks: int, parallel: str) -> list[str]:
    form = ["--parallel", parallel] if ranks > 1 else []
    # A spare front process would load itself while something is measured.
    return ["serve", "--model", str(model), "--port", str(port), "--no-spare-front", *form]


def _form(ranks: int, parallel: str, backend: str) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks {parallel}, {backend}"


def _free_ports_from() -> int:
    """The first of some ports in a row; mlx.launch counts up from it."""
    return 20000 + free_port() % 10000


class Server(Program):
    """A contestant that runs."""

    def __init__(self, contestant: Contestant) -> None:
        super().__init__(contestant.argv)
        self.contestant = contestant
        self.start_up_s = 0.0

    def wait_until_ready(self, timeout_s: float = READY_S) -> None:
        """Until it answers; then it is kept quiet. Raises BenchmarkError."""
        deadline_s = self.started_s + timeout_s
        while error := self.answer(1, timeout_s=20):
            if time.monotonic() > deadline_s or not self.running:
                raise BenchmarkError(f"{self.contestant.label} is not ready ({error}):\n{self.tail()}")
            time.sleep(0.1)
        self.start_up_s = time.monotonic() - self.started_s

    def answer(self, tokens: int, timeout_s: float = 60) -> str:
        """One small request; what went wrong, or nothing."""
        what = Ask(" the cat sat", tokens)
        return asyncio.run(ask(self.contestant.endpoint, what, timeout_s)).error

    def quieten(self) -> None:
        if self.contestant.quiet == "all":
            self.pause()
        elif self.contestant.quiet == "launcher":
            self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Ready to be measured, with one request served since it slept."""
        self.resume()
        if error := self.answer(2):
            raise BenchmarkError(f"{self.contestant.label} does not answer ({error}):\n{self.tail()}")
