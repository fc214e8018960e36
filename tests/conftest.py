"""Shared by all tests: a fast BLAS before anything imports mlx, and none of a surrounding run's variables."""

from __future__ import annotations

import os

from lockstep.model.blas import prepare_blas

for name in [n for n in os.environ if n.startswith(("MLX_", "OMPI_", "PMI", "LOCKSTEP_"))]:
    if name not in ("LOCKSTEP_CACHE", "MLX_MPI_LIBNAME"):
        del os.environ[name]
prepare_blas(local_size=2)
