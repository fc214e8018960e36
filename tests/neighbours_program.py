"""What one rank does in the test of Neighbours: two messages go down the chain, and rank 0 takes its time.

Arguments: backend, a folder in which each rank says that it has received and computed everything.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx.core as mx

from lockstep.model.pipeline import Neighbours
from lockstep.runtime import libmpi, rank
from waiting import wait_until

SHAPE = (16, 1024, 1024)
"""64 MB of float32: more than sockets keep for who does not read them."""


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    libmpi.prepare(os.environ)
    group = mx.distributed.init(strict=True, backend=backend)
    assert backend != "mpi" or libmpi.takes_threads()
    neighbours = Neighbours(group, mx.new_stream(mx.cpu))
    if group.rank() == 0:
        wait_until(lambda: (folder / "1").exists(), 30)
    sent = []
    for value in (1.0, 2.0):
        message = mx.full(SHAPE, value)
        if group.rank() < group.size() - 1:
            message = neighbours.receive(SHAPE, mx.float32)
        assert message.mean().item() == value
        if group.rank() > 0:
            sent.append(neighbours.send(message))
            mx.async_eval(sent[-1])
    (folder / str(group.rank())).touch()
    mx.eval(sent)


if __name__ == "__main__":
    rank.end_together()
    main()
