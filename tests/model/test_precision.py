"""Precision: a fast BLAS before mlx, and float32 models that compute what the quantized ones do."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from lockstep.model import precision

SOURCE = Path(precision.__file__).parents[2]
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")

linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or precision._cuda_build(), reason="mlx has its own BLAS"
)


def child(code, **env):
    clean = {k: v for k, v in os.environ.items() if k not in THREADS}
    done = subprocess.run(
        [sys.executable, "-c", "from lockstep.model import precision\n" + code],
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
choice = precision.prepare_blas(1)
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
    code = f"print(precision.prepare_blas({cores}).threads, *map(__import__('os').environ.get, {THREADS}))"
    assert child(code) == ["1"] * 4
    assert child("print(precision.prepare_blas(1).threads)") == [str(cores)]
    assert child(f"print(precision.prepare_blas({10 * cores}).threads)") == ["1"]


@linux_cpu
@pytest.mark.parametrize("variable", THREADS)
def test_the_number_of_threads_that_the_user_set_wins(variable):
    assert child("print(precision.prepare_blas(64).threads)", **{variable: "3"}) == ["3"]


@linux_cpu
def test_choosing_a_blas_after_mlx_was_imported_is_refused():
    code = """
import mlx.core
try:
    precision.prepare_blas(1)
except precision.LockstepError:
    print("refused")
"""
    assert child(code) == ["refused"]


@linux_cpu
def test_a_library_that_ends_the_process_is_passed_over(tmp_path):
    broken = tmp_path / "libopenblas.so"
    broken.write_bytes(b"\x7fELF garbage")
    code = f"""
import pathlib
found = list(precision._libraries())
precision._libraries = lambda: iter([("broken", pathlib.Path({str(broken)!r})), *found])
print(precision.prepare_blas(1).name)
precision._PROBE = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
print(precision._works(found[0][1], []))
"""
    name, works = child(code)
    assert name in ("OpenBLAS", "MKL")
    assert works == "False"


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.layers = [nn.Linear(64, 64), nn.Linear(64, 32, bias=False)]
        self.experts = SwitchLinear(64, 32, 4)
        self.heads = MultiLinear(64, 32, 3)
        self.norm = nn.RMSNorm(64)
        self.table = mx.arange(5)

    def __call__(self, tokens):
        h = self.norm(self.layers[0](self.embedding(tokens)))
        experts = self.experts(h[:, None, :], mx.array([[0], [3]]))
        return [
            self.layers[1](h),
            experts,
            self.heads(mx.broadcast_to(h, (1, 3, *h.shape))),
            self.embedding.as_linear(h),
        ]


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4)]
)
def test_a_quantized_model_becomes_a_dense_float32_one_that_computes_the_same(mode, group_size, bits):
    mx.random.seed(0)
    model = Mixed()
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    expected = model(mx.array([3, 7]))
    model.norm.set_dtype(mx.bfloat16)  # its ones lose nothing

    precision.cpu_float32(model)
    kinds = [type(module) for module in model.leaf_modules().values() if isinstance(module, nn.Module)]
    assert not any("Quantized" in kind.__name__ for kind in kinds)
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {mx.float32, mx.int32}
    # mlx dequantizes an mxfp4 embedding to bfloat16, less exactly than here.
    tolerance = 1e-4 if mode == "affine" else 0.02
    for got, wanted in zip(model(mx.array([3, 7])), expected, strict=True):
        assert got.dtype == mx.float32
        assert mx.allclose(got, wanted, atol=tolerance, rtol=tolerance)


def test_becoming_float32_evaluates_nothing(tmp_path):
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    nn.quantize(model, group_size=64, bits=4)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), dict(tree_flatten(model.parameters())))
    model.load_weights(list(mx.load(str(tmp_path / "w.safetensors")).items()))
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    precision.cpu_float32(model)
    assert mx.get_peak_memory() - held < 100_000
    mx.eval(model.layers[0].parameters())
    one = 512 * 512 * 4
    assert one <= mx.get_peak_memory() - held < 2.5 * one
