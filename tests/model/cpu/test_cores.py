import os
import subprocess
import sys

import mlx.core as mx
import pytest

from lockstep.model.blas import threads
from lockstep.model.cpu.cores import on_cores


@pytest.mark.parametrize(
    ("given", "worth", "units", "parts"),
    [(3, 9, 7, 3), (3, 2, 7, 2), (9, 9, 2, 2), (1, 9, 7, 1), (3, 0, 7, 1)],
)
def test_parts_are_computed_in_a_stream_each_and_make_the_whole(given, worth, units, parts, monkeypatch):
    monkeypatch.setattr("lockstep.model.cpu.cores.cores", lambda: given)
    x = mx.random.randint(-9, 10, (64, units, 16)).astype(mx.float32)
    streams = []

    def compute(first, last):
        streams.append(str(mx.default_stream(mx.cpu)))
        return x[:, first:last] @ mx.ones((16, 1))

    for _ in range(2):
        assert mx.array_equal(on_cores(compute, units, worth, 1).squeeze(-1), x.sum(axis=-1))
    assert streams[:parts] == streams[parts:]
    assert len(set(streams)) == parts


@pytest.mark.skipif(not threads() or os.cpu_count() == 1, reason="needs OpenBLAS, and two cores to give it")
@pytest.mark.parametrize(
    ("kernel", "count", "compact"),
    [("", 1, False), ("", 2, False), ("Haswell", 2, False), ("Haswell", 2, True)],
)
def test_openblas_leaves_its_cores_where_we_share_out_the_products(kernel, count, compact):
    script = (
        "from lockstep.model.blas import AVX512, kernels, prepare_blas, threads\n"
        "prepare_blas(1)\n"
        "import mlx.nn as nn\n"
        "from lockstep.model.cpu import cores, fit_for_cpu\n"
        "counts = [int(kernels() in AVX512), threads()]\n"
        f"for _ in range(2): fit_for_cpu(nn.Linear(8, 8), compact={compact})\n"
        "print(*counts, cores.cores(), threads())"
    )
    environment = {"OPENBLAS_NUM_THREADS": str(count)} | ({"OPENBLAS_CORETYPE": kernel} if kernel else {})
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ours, *counts = map(int, told.stdout.split())
    assert counts == ([count, count, 1] if ours or compact else [count, 1, count])
    assert not (ours and kernel)
