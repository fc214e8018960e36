"""One rank under `mpirun`, started as `python -m lockstep.launch.mpi_rank ARGV...`.

mpirun mixes the output of its ranks and reports one status for all. So rank 0's standard output stays as it
is, and everything else travels on standard error as records, one a line, that name their rank:

    RS rank " " kind " " data     kind o, e: standard output, error; x: exit status (all in base64)

Text outside records is mpirun's own.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

_OF_MPIRUN = ("LOCKSTEP_LIFELINE_FD", "LOCKSTEP_STDIN_FIFO")

RECORD = b"\x1e"
GRACE_S = 0.8
"""Less than the second that Open MPI allows between SIGTERM and SIGKILL."""


def main(argv: list[str]) -> int:
    """Run `argv` as this rank; returns its exit status, 128 + signal when a signal ended it."""
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
    # Open MPI 5 loses or never ends what it forwards to standard input, so rank 0 has a pipe of its own.
    fifo = os.environ.get("LOCKSTEP_STDIN_FIFO", os.devnull) if rank == 0 else os.devnull
    try:
        process = subprocess.Popen(
            argv,
            stdin=os.open(fifo if Path(fifo).exists() else os.devnull, os.O_RDONLY),
            stdout=None if rank == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=rank_environment(rank, os.environ),
        )
    except OSError as error:
        return _end(rank, 127, f"lockstep: error: cannot start {argv[0]}: {error.strerror}\n")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: threading.Thread(target=_stop, args=(process,), daemon=True).start())
    pumps = [
        threading.Thread(target=_pump, args=(rank, kind, stream), daemon=True)
        for kind, stream in (("o", process.stdout), ("e", process.stderr))
        if stream is not None
    ]
    for pump in pumps:
        pump.start()
    status = process.wait()
    for pump in pumps:
        pump.join(1)
    return _end(rank, status if status >= 0 else 128 - status)


def rank_environment(rank: int, env: Mapping[str, str]) -> dict[str, str]:
    """`env` with what differs between ranks. The agent's lifeline is tied to mpirun, not to its ranks."""
    own = {name: value for name, value in env.items() if name not in _OF_MPIRUN}
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if name in env:
            own["LOCKSTEP_LOCAL_SIZE"] = env[name]
    if "," in env.get("LOCKSTEP_MEMORY_GB", ""):
        own["LOCKSTEP_MEMORY_GB"] = env["LOCKSTEP_MEMORY_GB"].split(",")[rank]
    return own


def record(rank: int, kind: str, data: bytes) -> bytes:
    """One line for the launcher."""
    return RECORD + f"{rank} {kind} ".encode() + base64.b64encode(data) + b"\n"


def _pump(rank: int, kind: str, stream: IO[bytes]) -> None:
    while data := os.read(stream.fileno(), 2048):  # a record stays below PIPE_BUF, so it is written whole
        os.write(2, record(rank, kind, data))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _end(rank: int, status: int, text: str = "") -> int:
    if text:
        os.write(2, record(rank, "e", text.encode()))
    os.write(2, record(rank, "x", str(status).encode()))
    return status


def parse(line: bytes) -> tuple[int, str, bytes]:
    """Rank, kind and data of a record without its RS and newline."""
    rank, kind, data = line.split(b" ")
    return int(rank), kind.decode(), base64.b64decode(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
