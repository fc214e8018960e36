"""`mlx_lm.server` with the BLAS that Lockstep's ranks use."""

import os

from lockstep.model.blas import prepare_blas

prepare_blas(int(os.environ.get("LOCKSTEP_LOCAL_SIZE", "1")))

from mlx_lm.server import main  # noqa: E402

main()
