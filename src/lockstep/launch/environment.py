"""The environment variables that tell a process it is a rank, and those that every rank receives."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lockstep.runtime.environment import RANK_VARIABLES

SET_BY_LAUNCHERS = (
    *RANK_VARIABLES,
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
    "MLX_WORLD_SIZE",
    "NCCL_HOST_IP",
    "NCCL_PORT",
    "LOCKSTEP_BACKEND",
    "LOCKSTEP_WORLD_SIZE",
    "LOCKSTEP_LOCAL_SIZE",
    "LOCKSTEP_LIFELINE_FD",
    "LOCKSTEP_STDIN_FIFO",
    "LOCKSTEP_ADDRESS",
)
"""What must not leak from one run into another."""

FORWARDED = ("LOCKSTEP_", "MLX_", "HF_", "TRANSFORMERS_", "OPENBLAS_", "MKL_", "OMP_", "NCCL_", "PYTHON")
"""Beginnings of the variables that ranks on other machines receive from our environment."""


def detect(env: Mapping[str, str] | None = None) -> int | None:
    """The rank that this process was started as, by us, `mlx.launch` or `mpirun`; None outside a run."""
    env = os.environ if env is None else env
    return next((int(env[name]) for name in RANK_VARIABLES if env.get(name, "").isdigit()), None)


def forwarded() -> dict[str, str]:
    """Our own variables that every rank shall have, wherever it runs."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(FORWARDED) and name not in SET_BY_LAUNCHERS
    }
