"""One rank under `mpirun`, started as `python -m lockstep.launch.mpi_rank ARGV...`.

mpirun mixes the output of its ranks and reports one status for all. So rank 0's standard output stays as it
is, and everything else travels on standard error as records, one a line, that name their rank:

    RS rank " " kind " " data     kind o, e: standard output, error; x: exit status (all in base64)

mpirun passes on what it finds in a rank's pipe, up to 4096 bytes at a time (MPICH: 65536), and knows nothing
of lines. So every record is padded to one size that divides those, and none is cut in two by another rank's;
one that is damaged all the same is left out. Text outside records is mpirun's own.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lockstep.errors import LostPeer, complaint

_OF_MPIRUN = ("LOCKSTEP_LIFELINE_FD", "LOCKSTEP_LIFELINE_FIFO", "LOCKSTEP_STDIN_FIFO")

RECORD = b"\x1e"
SIZE = 512
"""Of a record, in bytes. POSIX writes as many to a pipe at once or not at all, whoever else is writing."""

_PIECE = re.compile(rb".{0,371}\n|.{1,372}", re.DOTALL)
"""What fits into a record, up to the end of a line where there is one: others' lines shall not cut it."""

_FIELDS = re.compile(rb"(\d{1,7}) ([oex]) (\S+) *")

GRACE_S = 0.8
"""Less than the second that Open MPI allows between SIGTERM and SIGKILL."""

_sending = threading.Lock()


def main(argv: list[str]) -> int:
    """Run `argv` as this rank; returns its exit status, 128 + signal when a signal ended it."""
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
    # Open MPI 5 loses or never ends what it forwards to standard input, so rank 0 has a pipe of its own.
    fifo = os.environ.get("LOCKSTEP_STDIN_FIFO", os.devnull) if rank == 0 else os.devnull
    # The agent's lifeline is tied to mpirun, so the rank has one to this process, and this one to the agent.
    started: list[subprocess.Popen[bytes]] = []
    threading.Thread(target=_end_with_agent, args=(started,), daemon=True).start()
    lifeline, _held = os.pipe()
    try:
        process = subprocess.Popen(
            argv,
            stdin=os.open(fifo if Path(fifo).exists() else os.devnull, os.O_RDONLY),
            stdout=None if rank == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=rank_environment(rank, os.environ) | {"LOCKSTEP_LIFELINE_FD": str(lifeline)},
            pass_fds=(lifeline,),
        )
    except OSError as error:
        return _end(rank, 127, complaint(f"cannot start {argv[0]}: {error.strerror}") + "\n")
    os.close(lifeline)
    started.append(process)
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
    """`env` with what differs between ranks, and without what is meant for mpirun and for this process."""
    own = {name: value for name, value in env.items() if name not in _OF_MPIRUN}
    if "," in env.get("LOCKSTEP_MEMORY_GB", ""):
        own["LOCKSTEP_MEMORY_GB"] = env["LOCKSTEP_MEMORY_GB"].split(",")[rank]
    return own


def records(rank: int, kind: str, data: bytes) -> list[bytes]:
    """Lines for the launcher, of SIZE bytes each."""
    pieces = [base64.b64encode(piece) for piece in _PIECE.findall(data)]
    return [(RECORD + f"{rank} {kind} ".encode() + piece).ljust(SIZE - 1) + b"\n" for piece in pieces]


def parse(line: bytes, size: int) -> tuple[int, str, bytes] | None:
    """Rank, kind and data of a record of one of `size` ranks, without its RS and newline; None if damaged."""
    found = _FIELDS.fullmatch(line) if len(line) == SIZE - 2 else None
    if found is None or int(found[1]) >= size:
        return None
    try:
        data = base64.b64decode(found[3], validate=True)
    except binascii.Error:
        return None
    return None if found[2] == b"x" and not data.isdigit() else (int(found[1]), found[2].decode(), data)


def _pump(rank: int, kind: str, stream: IO[bytes]) -> None:
    while data := os.read(stream.fileno(), 65536):
        _send(rank, kind, data)


def _send(rank: int, kind: str, data: bytes) -> None:
    with _sending, contextlib.suppress(BrokenPipeError):  # Without an mpirun, the rank is about to be ended.
        for record in records(rank, kind, data):
            os.write(2, record)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _end_with_agent(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the rank, and end, when the agent has: mpirun may live on, or have been killed itself."""
    path = os.environ.get("LOCKSTEP_LIFELINE_FIFO", "")
    if not Path(path).is_fifo():
        return  # On another machine, mpirun's own daemon ends what it has started.
    lifeline = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # It would wait for an agent that has gone already.
    os.set_blocking(lifeline, True)
    os.read(lifeline, 1)
    for process in started:
        process.kill()
    os._exit(LostPeer.exit_status)


def _end(rank: int, status: int, text: str = "") -> int:
    _send(rank, "e", text.encode())
    _send(rank, "x", str(status).encode())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
