"""`mlx_lm.server` with the BLAS that Lockstep's ranks use."""

import os

from lockstep.model.blas import prepare_blas
from lockstep.runtime.environment import RankEnvironment

prepare_blas(RankEnvironment.read(os.environ).local_size)

from mlx_lm.server import main  # noqa: E402

main()
