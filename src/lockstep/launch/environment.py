"""The environment variables that launchers set for their ranks, and ours that every rank receives."""

from __future__ import annotations

import os

from lockstep.runtime import beats
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
    "LOCKSTEP_LIFELINE_FIFO",
    "LOCKSTEP_STDIN_FIFO",
    "LOCKSTEP_ADDRESS",
    "LOCKSTEP_SPLIT",
    beats.ENVIRONMENT,
)
"""What must not leak from one run into another."""

FORWARDED = ("LOCKSTEP_", "MLX_", "HF_", "TRANSFORMERS_", "OPENBLAS_", "MKL_", "OMP_", "NCCL_", "PYTHON")
"""Beginnings of the variables that ranks on other machines receive from our environment."""


def forwarded() -> dict[str, str]:
    """Our own variables that every rank shall have, wherever it runs."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(FORWARDED) and name not in SET_BY_LAUNCHERS
    }
