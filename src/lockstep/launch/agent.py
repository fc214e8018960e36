"""What stands between the launcher and one rank, on the rank's machine. It imports nothing of Lockstep.

The launcher sends this file as text over the agent's standard input (locally by a pipe, elsewhere through
ssh), then the order as JSON, then what the rank shall read: frames of a line with the length and that many
bytes, length 0 for the end of the input. The pipe is also the lifeline: when it closes, because the launcher
ended, was killed or lost the connection, the agent ends the rank and everything that the rank has started.
The agent exits with the rank's status, 128 + signal when a signal ended it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any, BinaryIO, NoReturn

HELLO = b"\x1elockstep agent\n"
CANNOT_START = 127
OLDEST_PYTHON = (3, 11)


def main(pipe: BinaryIO) -> NoReturn:
    order = json.loads(pipe.read(int(pipe.readline())))
    if order["greet"]:
        os.write(2, HELLO)
    if sys.version_info[:2] < OLDEST_PYTHON:  # Up to here, and as a whole to be read, this must suit 3.8.
        os._exit(complain(CANNOT_START, too_old()))
    folder = tempfile.mkdtemp(prefix="lockstep-")
    try:
        status = run(order, folder, pipe)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # The reader thread still holds the pipe; the ordinary end of the interpreter would wait for it.
    os._exit(status)


def too_old() -> str:
    found, oldest = (".".join(map(str, version)) for version in (sys.version_info[:3], OLDEST_PYTHON))
    where = f"{sys.executable} on {socket.gethostname()}"
    return f"Python {found} at {where} is older than {oldest}: give another with --python"


def run(order: dict[str, Any], folder: str, pipe: BinaryIO) -> int:
    """Start the rank, feed it, wait for it; returns the exit status."""
    if taken := unusable_port(order["ports"]):
        return complain(1, taken)
    env = {k: v for k, v in os.environ.items() if k not in order["unset"]} | order["env"]
    for name, text in order["files"].items():
        env[name] = os.path.join(folder, name.lower())  # noqa: PTH118
        with open(env[name], "w") as file:  # noqa: PTH123
            file.write(text)
    cwd = order["cwd"]
    if not os.path.isdir(cwd):  # noqa: PTH112
        if order["cwd_must_exist"]:
            return complain(
                1, f"the folder {cwd} does not exist on {socket.gethostname()}: choose another --cwd"
            )
        cwd = os.path.expanduser("~")  # noqa: PTH111
    fifo = os.path.join(folder, "stdin") if order["stdin"] == "fifo" else None  # noqa: PTH118
    if fifo:
        os.mkfifo(fifo)
        env["LOCKSTEP_STDIN_FIFO"] = fifo
    lifeline, held = os.pipe()
    env["LOCKSTEP_LIFELINE_FD"] = str(lifeline)
    if order["mpirun"]:  # It hands no descriptors on to its ranks, so they have to find their lifeline.
        env["LOCKSTEP_LIFELINE_FIFO"] = os.path.join(folder, "lifeline")  # noqa: PTH118
        os.mkfifo(env["LOCKSTEP_LIFELINE_FIFO"])
        os.open(env["LOCKSTEP_LIFELINE_FIFO"], os.O_RDWR)  # Closed when this process ends, however it does.
    try:
        rank = subprocess.Popen(
            order["argv"],
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE if order["stdin"] == "pipe" else subprocess.DEVNULL,
            pass_fds=(lifeline,),
            process_group=0,
        )
    except OSError as error:
        return complain(CANNOT_START, f"cannot start {order['argv'][0]}: {error.strerror}")
    os.close(lifeline)
    return attend(rank, pipe, fifo, order["grace_s"])


def attend(rank: subprocess.Popen[bytes], pipe: BinaryIO, fifo: str | None, grace_s: float) -> int:
    """Wait until the rank ends, by itself or because the launcher or a signal asks for it."""
    stop, gone = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    ender = threading.Thread(target=end_when_asked, args=(rank.pid, stop, gone, grace_s), daemon=True)
    for thread in (
        threading.Thread(target=read_frames, args=(pipe, frames, stop), daemon=True),
        threading.Thread(target=write_frames, args=(rank.stdin, fifo, frames), daemon=True),
        ender,
    ):
        thread.start()
    status = rank.wait()
    gone.set()
    if stop.is_set():
        ender.join(5)
    send(rank.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def read_frames(pipe: BinaryIO, frames: queue.SimpleQueue[bytes], stop: threading.Event) -> None:
    # Always read on, even when the rank does not: the end of this pipe must never wait behind its input.
    while line := pipe.readline():
        frames.put(pipe.read(int(line)))
    stop.set()


def write_frames(stdin: IO[bytes] | None, fifo: str | None, frames: queue.SimpleQueue[bytes]) -> None:
    if fifo:
        stdin = open(fifo, "wb")  # noqa: PTH123, SIM115 (returns when the rank opens its end)
    if stdin is None:
        return
    with contextlib.suppress(BrokenPipeError), stdin:
        while data := frames.get():
            stdin.write(data)
            stdin.flush()


def end_when_asked(pid: int, stop: threading.Event, gone: threading.Event, grace_s: float) -> None:
    """SIGTERM, then SIGKILL after `grace_s`, to the rank's process group and to all its descendants."""
    stop.wait()
    family = descendants(pid)
    send(pid, signal.SIGTERM)
    send(pid, signal.SIGCONT)
    if not gone.wait(grace_s):
        family |= descendants(pid)
    send(pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member, signal.SIGKILL)


def send(group: int, number: int) -> None:
    # macOS answers EPERM for a group that holds only ended processes.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def descendants(root: int) -> set[int]:
    """Every process below `root`; mpirun puts its ranks in process groups of their own."""
    parents = dict(parent_of(pid) for pid in pids) if (pids := proc_pids()) else parents_by_ps()
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def proc_pids() -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    return []


def parent_of(pid: int) -> tuple[int, int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return pid, int(file.read().rpartition(")")[2].split()[1])
    return pid, 0


def parents_by_ps() -> dict[int, int]:
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, timeout=5)
    rows = [line.split() for line in listing.stdout.splitlines()]
    return {int(row[0]): int(row[1]) for row in rows if len(row) == 2}


def unusable_port(addresses: list[tuple[str, int]]) -> str | None:
    """Why this machine cannot listen at one of `addresses`, or None."""
    for ip, port in addresses:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ip, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    return (
                        f"{ip} is not an address of {socket.gethostname()}: correct its ips in the hostfile"
                    )
                return f"cannot listen on {ip}:{port} ({error.strerror}): choose another --ring-port"
    return None


def complain(status: int, reason: str) -> int:
    os.write(2, f"lockstep: error: {reason}\n".encode())
    return status


if __name__ == "__main__":
    main(sys.stdin.buffer)
