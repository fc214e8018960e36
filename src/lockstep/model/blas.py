"""The BLAS that mlx multiplies with on a CPU.

The Linux CPU build of mlx carries the reference BLAS: multiplying 64 rows takes it 15 to 50 times as long as
OpenBLAS or MKL.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lockstep.errors import LockstepError

AVX2 = ("Haswell", "Zen")
AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""What OpenBLAS calls its kernels for x86-64 processors with these instructions."""

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_DESCRIPTORS = "/proc/self/fd/"
_PROBE_LIMIT_S = 20.0


@dataclass(frozen=True)
class BlasChoice:
    """The BLAS that mlx computes with on CPU; `threads` is None where it was not ours to choose."""

    name: str
    threads: int | None


def prepare_blas(local_size: int, env: MutableMapping[str, str] = os.environ) -> BlasChoice:
    """Load a fast BLAS, with this rank's part of the cores, for mlx to use. Call it before mlx is imported.

    The symbols of a library loaded globally come before those of the BLAS that mlx was linked with. What the
    user has set in the environment wins. Nothing is done where mlx brings its own (macOS, CUDA). Raises
    LockstepError when mlx has been imported already.
    """
    if sys.platform != "linux" or cuda_build():
        return BlasChoice("mlx's own", None)
    if "mlx.core" in sys.modules:
        raise LockstepError("mlx was imported before its BLAS was chosen: call prepare_blas() first")
    threads = _chosen_threads(env) or max(1, _usable_cores() // local_size)
    for variable in _THREAD_VARIABLES:
        env.setdefault(variable, str(threads))
    runtime = _load_fortran_runtime()
    for name, path in _libraries():
        if _works(path, runtime) and _load(path, ctypes.RTLD_GLOBAL):
            return BlasChoice(name, threads)
    return BlasChoice("reference, slow: install ngsolve-openblas", threads)


@cache
def kernels() -> str:
    """What multiplies: "MKL", OpenBLAS' name of the kernels it has chosen, or ""."""
    loaded = ctypes.CDLL(None)
    if hasattr(loaded, "MKL_Get_Version"):
        return "MKL"
    if not hasattr(loaded, "openblas_get_corename"):
        return ""
    loaded.openblas_get_corename.restype = ctypes.c_char_p
    name: bytes = loaded.openblas_get_corename()
    return name.decode()


def threads() -> int:
    """How many of them OpenBLAS multiplies with; 0 if it is not OpenBLAS that does."""
    loaded = ctypes.CDLL(None)
    return loaded.openblas_get_num_threads() if hasattr(loaded, "openblas_get_num_threads") else 0


def set_threads(count: int) -> None:
    """Let OpenBLAS multiply with so many from now on."""
    ctypes.CDLL(None).openblas_set_num_threads(count)


def _load(path: str | Path, mode: int = ctypes.RTLD_LOCAL) -> bool:
    try:
        ctypes.CDLL(str(path), mode)
    except OSError:
        return False  # Of another platform, or lacking a library: the start-up summary names the choice.
    return True


_PROBE = f"""
import ctypes, signal, sys
signal.alarm({_PROBE_LIMIT_S:.0f})
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the process that tries.
*runtime, library = map(ctypes.CDLL, sys.argv[1:])
ones, product = (ctypes.c_float * 4096)(*[1.0] * 4096), (ctypes.c_float * 4096)()
one, zero = ctypes.c_float(1), ctypes.c_float(0)
library.cblas_sgemm(101, 111, 112, 64, 64, 64, one, ones, 64, ones, 64, zero, product, 64)
sys.exit(0 if product[4095] == 64 else 1)
"""


def _works(library: Path, runtime: list[str]) -> bool:
    """Whether a library multiplies matrices, tried in a process of its own.

    Some builds are for one kind of processor and end the process with an illegal instruction on another.
    """
    command = [sys.executable, "-I", "-S", "-c", _PROBE, *runtime, str(library)]
    copies = [int(path.rpartition("/")[2]) for path in runtime if path.startswith(_DESCRIPTORS)]
    try:
        tried = subprocess.run(command, pass_fds=copies, capture_output=True, timeout=_PROBE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode == 0


def _load_fortran_runtime() -> list[str]:
    """Give OpenBLAS the libgfortran.so.5 that it was linked with, on machines without one; what was loaded.

    mlx's CPU wheel brings that library under a name of its own. A library counts as loaded by the name it
    calls itself, so a copy in memory that calls itself by the usual name is loaded.
    """
    usual = b"libgfortran.so.5\0"
    if _load(usual[:-1].decode()):
        return []
    for folder in _site_packages():
        for bundled in sorted((folder / "mlx_cpu.libs").glob("libgfortran-*.so.5*")):
            own = bundled.name.encode() + b"\0"
            copy = os.memfd_create("libgfortran")
            os.write(copy, bundled.read_bytes().replace(own, usual.ljust(len(own), b"\0")))
            needed = [*map(str, bundled.parent.glob("libquadmath-*.so*")), f"{_DESCRIPTORS}{copy}"]
            if all(_load(path) for path in needed):
                return needed
            os.close(copy)
    return []


def _site_packages() -> list[Path]:
    return [Path(folder) for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]


def _chosen_threads(env: MutableMapping[str, str]) -> int | None:
    set_by_user = [env[variable] for variable in _THREAD_VARIABLES if env.get(variable, "").isdigit()]
    return int(set_by_user[0]) if set_by_user else None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cuda_build() -> bool:
    """Whether the mlx that is installed is the one for NVIDIA cards."""
    names = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
    return any(any(importlib.metadata.Distribution.discover(name=name)) for name in names)


def _libraries() -> Iterator[tuple[str, Path]]:
    """Installed libraries that may serve, the fastest first."""
    packages = _site_packages()
    prefixes = [Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib"]
    places = {
        "MKL": prefixes,
        "OpenBLAS": [p / sub for sub in ("ngsolve_openblas", "cmeel.prefix/lib") for p in packages]
        + prefixes,
    }
    patterns = {"MKL": "libmkl_rt.so*", "OpenBLAS": "libopenblas*.so*"}
    for name, folders in places.items():
        for folder in folders:
            # Of the names of one file, the shortest is the link that is meant for loading.
            yield from ((name, path) for path in sorted(folder.glob(patterns[name]))[:1])
