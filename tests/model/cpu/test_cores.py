import os
import subprocess
import sys
from functools import partial

import mlx.core as mx
import pytest

from lockstep.model.blas import threads
from lockstep.model.cpu.cores import side_by_side


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_come_back_in_order_from_a_stream_each(count):
    x = mx.random.randint(-9, 10, (64, 64)).astype(mx.float32)
    results = side_by_side([partial(mx.matmul, x, mx.full((64,), part)) for part in range(count)])
    total = mx.stack(results).sum(axis=0)
    assert all(mx.array_equal(result, part * x.sum(axis=1)) for part, result in enumerate(results))
    assert mx.array_equal(total, sum(range(count)) * x.sum(axis=1))


def test_parts_have_streams_of_their_own():
    streams = []

    def part():
        streams.append(str(mx.default_stream(mx.cpu)))
        return mx.zeros(())

    for _ in range(2):
        side_by_side([part] * 3)
    assert streams[:3] == streams[3:]
    assert len(set(streams)) == 3


@pytest.mark.skipif(not threads() or os.cpu_count() == 1, reason="needs OpenBLAS, and two cores to give it")
@pytest.mark.parametrize("count", [1, 2])
def test_openblas_leaves_its_cores(count):
    script = (
        "from lockstep.model.blas import prepare_blas, threads\n"
        "prepare_blas(1)\n"
        "from lockstep.model.cpu.cores import cores\n"
        "print(threads(), cores(), cores(), threads())"
    )
    environment = {"OPENBLAS_NUM_THREADS": str(count)}
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert told.stdout.split() == [str(number) for number in (count, count, count, 1)]
