"""The libmpi that mlx loads: where it lies, and how it is to behave."""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "MLX_MPI_LIBNAME"
"""From which mlx takes the library's path."""

_NAMES = ("libmpi.so.40", "libmpi.40.dylib", "libmpi.so.12", "libmpi.12.dylib")

_SETTINGS = {
    # Who waits leaves its core to whoever has work: another rank, or another thread of this one.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # mlx asks for no threads at all.
    "OMPI_MPI_THREAD_LEVEL": "3",
    "MPIR_CVAR_DEFAULT_THREAD_LEVEL": "MPI_THREAD_MULTIPLE",
}
_MULTIPLE = 3
"""MPI_THREAD_MULTIPLE of Open MPI and of MPICH."""


def prepare(env: MutableMapping[str, str]) -> None:
    """Set in this process's environment what MPI, and mlx of MPI, read there, unless somebody has.

    mlx looks where systems keep libraries, and must be told of an Open MPI with a prefix of its own: one that
    started this process says where it is.
    """
    for name, value in _SETTINGS.items():
        env.setdefault(name, value)
    if VARIABLE not in env and "OPAL_PREFIX" in env and (found := find(Path(env["OPAL_PREFIX"]))):
        env[VARIABLE] = found


def takes_threads() -> bool:
    """Whether the MPI of this process, which has joined the others, lets several threads call it at once."""
    # mlx lets its symbols be seen by all; where a system does not, nobody can ask.
    query = getattr(ctypes.CDLL(None), "MPI_Query_thread", None)
    level = ctypes.c_int()
    return query is not None and query(ctypes.byref(level)) == 0 and level.value == _MULTIPLE


def find(prefix: Path) -> str | None:
    """Its path; None when there is none in `prefix`."""
    for name in _NAMES:
        for pattern in (f"lib/{name}", f"lib64/{name}", f"lib/*/{name}", f"lib/*/*/lib/{name}"):
            if found := next(iter(sorted(prefix.glob(pattern))), None):
                return str(found)
    return None
