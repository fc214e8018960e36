"""Times communication between two ranks, the same program on both: comm_rank.py KIND PORT BUDGET_S SIZE...

KIND is the mlx backend "ring" or "mpi", or what it is measured against: "tcp" (sockets), "mpi4py", and "zmq",
the library and encryption of our control channel. Rank 0 prints one line of JSON: seconds by call and size.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable

kind, port, budget_s, *sizes = sys.argv[1:]
rank = int(os.environ.get("MLX_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
other = 1 - rank
Figures = dict[str, dict[str, float]]
CHAINED = 16


def main() -> None:
    measure = {"tcp": tcp, "zmq": zmq_curve, "mpi4py": mpi4py_calls}.get(kind, mlx_calls)
    found = measure([int(size) for size in sizes])
    if rank == 0:
        print(json.dumps(found), flush=True)


def median_s(call: Callable[[], None], count: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(count):
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def count_for(size: int) -> int:
    """Fewer of the large ones; the same number on both ranks, which must not look at a clock."""
    return max(10, min(400, int(float(budget_s) * 2e8 / (size + 2e5))))


def mlx_calls(sizes: list[int]) -> Figures:
    """Each call evaluated by itself, and sums as in tensor parallel: many in one graph, with computation."""
    from lockstep.model.blas import prepare_blas

    prepare_blas(local_size=2)
    import mlx.core as mx

    from lockstep.model.tensor.collectives import Meeting, most_exchanged

    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend=kind)
    meeting = Meeting(group, exchanged_bytes=most_exchanged(kind, group.size()))
    found: Figures = defaultdict(dict)
    rows, weights = mx.zeros((8, 768)), mx.zeros((768, 2048))
    mx.eval(rows, weights)

    def all_sum(x: mx.array) -> mx.array:
        return mx.distributed.all_sum(x, group=group)

    def chain(x: mx.array, add: Callable[[mx.array], mx.array], computing: bool) -> None:
        for _ in range(CHAINED):
            x = add(x + (rows @ weights).sum() if computing else x)
        mx.eval(x)

    for size in sizes:
        x = mx.zeros((max(size // 4, 1),))
        mx.eval(x)

        def ping_pong(x: mx.array = x) -> None:
            for turn in (0, 1):
                if turn == rank:
                    mx.eval(mx.distributed.send(x, other, group=group))
                else:
                    mx.eval(mx.distributed.recv_like(x, other, group=group))

        calls = {
            "all_sum": lambda x=x: mx.eval(all_sum(x)),
            "all_gather": lambda x=x: mx.eval(mx.distributed.all_gather(x, group=group)),
        }
        count = count_for(size)
        found["send/recv"][str(size)] = median_s(ping_pong, count) / 2
        for name, call in calls.items():
            found[name][str(size)] = median_s(call, count)
        few = max(5, count // CHAINED)
        found["all_sum in a graph"][str(size)] = median_s(lambda x=x: chain(x, all_sum, False), few) / CHAINED
        alone_s = median_s(lambda x=x: chain(x, lambda x: x, True), few)
        for name, add in (("all_sum", all_sum), ("lockstep's sum", meeting.sum)):
            added_s = median_s(lambda x=x, add=add: chain(x, add, True), few) - alone_s
            found[f"{name} between computations"][str(size)] = added_s / CHAINED
    return found


def mpi4py_calls(sizes: list[int]) -> Figures:
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    found: Figures = {name: {} for name in ("send/recv", "all_sum", "all_gather")}
    for size in sizes:
        mine = np.zeros(max(size // 4, 1), np.float32)
        theirs, both = np.empty_like(mine), np.empty(2 * len(mine), np.float32)

        def ping_pong(mine: np.ndarray = mine, theirs: np.ndarray = theirs) -> None:
            for turn in (0, 1):
                if turn == rank:
                    world.Send(mine, other)
                else:
                    world.Recv(theirs, other)

        count = count_for(size)
        found["send/recv"][str(size)] = median_s(ping_pong, count) / 2
        found["all_sum"][str(size)] = median_s(lambda a=mine, b=theirs: world.Allreduce(a, b), count)
        found["all_gather"][str(size)] = median_s(lambda a=mine, b=both: world.Allgather(a, b), count)
    return found


def tcp(sizes: list[int]) -> Figures:
    link = _connect()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = {}
    for size in sizes:
        mine, theirs = bytes(max(size, 4)), bytearray(max(size, 4))

        def receive(theirs: bytearray = theirs) -> None:
            view = memoryview(theirs)
            while view:
                view = view[link.recv_into(view) :]

        def ping_pong(mine: bytes = mine, receive: Callable[[], None] = receive) -> None:
            for turn in (0, 1):
                if turn == rank:
                    link.sendall(mine)
                else:
                    receive()

        times[str(size)] = median_s(ping_pong, count_for(size)) / 2
    return {"send/recv": times}


def _connect() -> socket.socket:
    if rank == 0:
        with socket.create_server(("127.0.0.1", int(port))) as listener:
            listener.settimeout(30)
            return listener.accept()[0]
    deadline_s = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", int(port)), timeout=30)
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def zmq_curve(sizes: list[int]) -> Figures:
    """The keys are no secret here: both ranks derive the same ones."""
    import zmq
    from zmq.utils import z85

    secret = z85.encode(bytes(range(32)))
    public = zmq.curve_public(secret)
    end = zmq.Context().socket(zmq.PAIR)
    end.rcvtimeo = end.sndtimeo = 30_000
    end.curve_publickey, end.curve_secretkey = public, secret
    if rank == 0:
        end.curve_server = True
        end.bind(f"tcp://127.0.0.1:{port}")
    else:
        end.curve_serverkey = public
        end.connect(f"tcp://127.0.0.1:{port}")
    times = {}
    for size in sizes:
        message = bytes(max(size, 4))

        def ping_pong(message: bytes = message) -> None:
            for turn in (0, 1):
                if turn == rank:
                    end.send(message)
                else:
                    end.recv()

        times[str(size)] = median_s(ping_pong, count_for(size)) / 2
    end.close(linger=1000)
    return {"send/recv": times}


main()
