"""Run one program on n ranks of this machine, with a time limit, and tell how each rank ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"


@dataclass(frozen=True)
class RankResult:
    """`status` is the rank's own exit status; negative means ended by that signal."""

    rank: int
    status: int
    stdout: str
    stderr: str


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def clean_env() -> dict[str, str]:
    """The caller's environment without any rank's variables."""
    foreign = ("MLX_", "OMPI_", "PMI", "LOCKSTEP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def base_env(local_size: int) -> dict[str, str]:
    """The caller's environment without any rank's variables, with the source tree importable."""
    return clean_env() | {
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(__file__).parent)]),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "LOCKSTEP_LOCAL_SIZE": str(local_size),
    }


def ring_env(rank: int, hostfile: Path) -> dict[str, str]:
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile), "LOCKSTEP_BACKEND": "ring"}


def mpi_env() -> dict[str, str]:
    """What Open MPI needs to run more ranks than cores, as root, and to be found by mlx."""
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    assert mpirun, "tests over mpi need mpirun: install the `mpi` extra"
    library = Path(mpirun).parent.parent / "lib" / "libmpi.so.40"
    return {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "LOCKSTEP_BACKEND": "mpi",
    } | ({"MLX_MPI_LIBNAME": str(library)} if library.exists() else {})


def run_ranks(
    program: str | list[str],
    n: int,
    backend: str = "ring",
    timeout_s: float = 90,
    env: dict[str, str] | None = None,
) -> list[RankResult]:
    """Run `program` (Python source, or arguments for this Python) on `n` ranks and wait for all of them.

    Raises TimeoutError, after ending every rank, when one is still running after `timeout_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(program, str):
            script = Path(folder) / "program.py"
            script.write_text(program)
            program = [str(script)]
        argv = [sys.executable, *program]
        common = base_env(n) | {"LOCKSTEP_WORLD_SIZE": str(n)} | (env or {})
        if backend == "mpi":
            return _run_mpi(argv, n, common | mpi_env(), Path(folder), timeout_s)
        hostfile = Path(folder) / "hosts.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
        commands = [(argv, common | (ring_env(r, hostfile) if n > 1 else {})) for r in range(n)]
        return _run_all(commands, Path(folder), timeout_s)


def _run_mpi(
    argv: list[str], n: int, env: dict[str, str], folder: Path, timeout_s: float
) -> list[RankResult]:
    # mpirun reports one status for all; a shell around each rank keeps the rank's own.
    script = 'r=$OMPI_COMM_WORLD_RANK; "$@" >$0/$r.out 2>$0/$r.err; s=$?; echo $s >$0/$r.status; exit $s'
    command = ["mpirun", "-n", str(n), "bash", "-c", script, str(folder), *argv]
    env = env | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])}
    _run_all([(command, env)], folder, timeout_s)

    def read(rank: int, kind: str) -> str:
        file = folder / f"{rank}.{kind}"
        return file.read_text(errors="replace") if file.exists() else ""

    return [RankResult(r, int(read(r, "status") or "-9"), read(r, "out"), read(r, "err")) for r in range(n)]


def _run_all(
    commands: list[tuple[list[str], dict[str, str]]], folder: Path, timeout_s: float
) -> list[RankResult]:
    with ExitStack() as stack:
        outputs = [
            [stack.enter_context((folder / f"rank{i}.{kind}").open("w+")) for kind in ("out", "err")]
            for i in range(len(commands))
        ]
        processes = [
            subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
            for (argv, env), (out, err) in zip(commands, outputs, strict=True)
        ]
        try:
            for process in processes:
                process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            tails = "".join(_text(err)[-1500:] for _, err in outputs)
            raise TimeoutError(f"still running after {timeout_s} s: {commands[0][0]}\n{tails}") from error
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return [
            RankResult(i, process.returncode, _text(out), _text(err))
            for i, (process, (out, err)) in enumerate(zip(processes, outputs, strict=True))
        ]


def _text(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return str(file.read())  # type: ignore[attr-defined]
