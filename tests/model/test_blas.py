"""A fast BLAS, before mlx."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lockstep.model import blas
from waiting import wait_until

SOURCE = Path(blas.__file__).parents[2]
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

linux_cpu = pytest.mark.skipif(sys.platform != "linux" or blas.cuda_build(), reason="mlx has its own BLAS")


def child(code, **env):
    clean = {k: v for k, v in os.environ.items() if k not in THREADS}
    done = subprocess.run(
        [sys.executable, "-c", "from lockstep.model import blas\n" + code],
        env=clean | {"PYTHONPATH": str(SOURCE)} | env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@linux_cpu
def test_the_chosen_blas_is_the_one_that_mlx_computes_with():
    code = """
choice = blas.prepare_blas(1)
import mlx.core as mx, numpy as np, re
a, b = mx.random.normal((64, 300)), mx.random.normal((300, 200))
assert np.abs(np.array(a @ b) - np.array(a) @ np.array(b)).max() < 1e-3
import ctypes
symbol = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    first, last = (int(edge, 16) for edge in re.match("(\\\\w+)-(\\\\w+)", line).groups())
    if first <= symbol < last:
        print(choice.name, line.split("/")[-1])
"""
    name, library = child(code)
    assert name in ("OpenBLAS", "MKL")
    assert library.startswith("libopenblas" if name == "OpenBLAS" else "libmkl")


@linux_cpu
def test_ranks_of_one_host_share_its_cores():
    cores = len(os.sched_getaffinity(0))
    code = f"print(blas.prepare_blas({cores}).threads, *map(__import__('os').environ.get, {THREADS}))"
    assert child(code) == ["1"] * 4
    assert child("print(blas.prepare_blas(1).threads)") == [str(cores)]
    assert child(f"print(blas.prepare_blas({10 * cores}).threads)") == ["1"]


@linux_cpu
@pytest.mark.parametrize("variable", THREADS)
def test_the_number_of_threads_that_the_user_set_wins(variable):
    assert child("print(blas.prepare_blas(64).threads)", **{variable: "3"}) == ["3"]


@linux_cpu
def test_choosing_a_blas_after_mlx_was_imported_is_refused():
    code = """
import mlx.core
try:
    blas.prepare_blas(1)
except blas.LockstepError:
    print("refused")
"""
    assert child(code) == ["refused"]


@linux_cpu
def test_a_library_that_ends_the_process_is_passed_over(tmp_path):
    broken = tmp_path / "libopenblas.so"
    broken.write_bytes(b"\x7fELF garbage")
    code = f"""
import pathlib
found = list(blas._libraries())
blas._libraries = lambda: iter([("broken", pathlib.Path({str(broken)!r})), *found])
print(blas.prepare_blas(1).name)
blas._PROBE = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
print(blas._works(found[0][1], []))
"""
    name, works = child(code)
    assert name in ("OpenBLAS", "MKL")
    assert works == "False"


@linux_cpu
def test_the_kernels_of_the_chosen_blas_have_a_name():
    assert len(child("blas.prepare_blas(1); print(blas.kernels())")) == 1


@linux_cpu
def test_a_trial_ends_with_the_process_that_made_it(tmp_path):
    library = tmp_path / "libopenblas.so"  # Whoever loads this waits for more of it.
    os.mkfifo(library)
    code = f"from lockstep.model import blas; import pathlib; blas._works(pathlib.Path({str(library)!r}), [])"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SOURCE)})
    with library.open("wb"):  # Returns when it is being loaded.
        [trial] = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        wait_until(lambda: not trial.is_running() or trial.status() == psutil.STATUS_ZOMBIE, 5)
