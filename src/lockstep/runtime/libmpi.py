"""The libmpi of an MPI with a prefix of its own: mlx looks where systems keep libraries, and must be told."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "MLX_MPI_LIBNAME"
"""From which mlx takes the library's path."""

_NAMES = ("libmpi.so.40", "libmpi.40.dylib", "libmpi.so.12", "libmpi.12.dylib")


def announce(env: MutableMapping[str, str]) -> None:
    """Tell mlx of the Open MPI that started this process and says where it is, unless that was done."""
    if VARIABLE not in env and "OPAL_PREFIX" in env and (found := find(Path(env["OPAL_PREFIX"]))):
        env[VARIABLE] = found


def find(prefix: Path) -> str | None:
    """Its path; None when there is none in `prefix`."""
    for name in _NAMES:
        for pattern in (f"lib/{name}", f"lib64/{name}", f"lib/*/{name}", f"lib/*/*/lib/{name}"):
            if found := next(iter(sorted(prefix.glob(pattern))), None):
                return str(found)
    return None
