"""What a rank is told by whoever started it: our launcher, `mlx.launch` or `mpirun`. Read once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lockstep.errors import UsageError

RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
Backend = Literal["ring", "jaccl", "jaccl-ring", "mpi", "nccl"]
BACKENDS = get_args(Backend)

ATTEMPT = "LOCKSTEP_ATTEMPT"
"""How often the ranks of this run have been started before; set by the supervisor."""

RESTART_REASON = "LOCKSTEP_RESTART_REASON"
"""Why the ranks of this run had to be started again; set by the supervisor."""


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place among the ranks.

    `addresses` holds the data plane's address of rank 0, and of the ranks after it where they are known;
    `split` the hostfile's layers, in the form of `--split`.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    backend: str = "ring"
    addresses: tuple[str, ...] = ()
    memory_bytes: int | None = None
    split: str = "auto"

    @classmethod
    def read(cls, env: Mapping[str, str]) -> RankEnvironment:
        """Take what the launcher said; infer the rest from the backend's own variables.

        Raises UsageError when a variable is malformed or the world size cannot be known.
        """
        if not is_rank(env):
            return cls(local_size=_integer(env, "LOCKSTEP_LOCAL_SIZE", 1), memory_bytes=_memory(env))
        backend = env.get("LOCKSTEP_BACKEND") or _infer_backend(env)
        if backend not in BACKENDS:
            raise UsageError(f"unknown backend {backend!r}: use one of {', '.join(BACKENDS)}")
        rank = next(_integer(env, name, 0) for name in RANK_VARIABLES if name in env)
        addresses = _addresses(env, backend)
        size = _integer(env, "LOCKSTEP_WORLD_SIZE", 0) or _infer_size(env, backend, addresses)
        local_size = _integer(env, "LOCKSTEP_LOCAL_SIZE", 0) or _infer_local_size(env, rank, addresses)
        split = env.get("LOCKSTEP_SPLIT", "auto")
        return cls(rank, size, local_size, backend, addresses, _memory(env), split)


def is_rank(env: Mapping[str, str]) -> bool:
    """Whether this process was started as a rank."""
    return any(name in env for name in RANK_VARIABLES)


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "")
    if not value:
        return default
    if not (value.isascii() and value.isdecimal()):
        raise UsageError(f"{name}={value!r} is not a number: the launcher sets it, do not set it by hand")
    return int(value)


def _memory(env: Mapping[str, str]) -> int | None:
    value = env.get("LOCKSTEP_MEMORY_GB")
    if not value:
        return None
    try:
        memory_gb = float(value)
    except ValueError:
        memory_gb = math.nan
    if not 0 < memory_gb < math.inf:
        raise UsageError(
            f"LOCKSTEP_MEMORY_GB={value!r} is no number of gigabytes: give one above 0, like 7.5"
        )
    return int(memory_gb * 1e9)


def _infer_backend(env: Mapping[str, str]) -> str:
    if "MLX_RANK" not in env:
        return "mpi"
    if "MLX_IBV_DEVICES" in env:
        return "jaccl-ring" if env.get("MLX_JACCL_RING") == "1" else "jaccl"
    return "nccl" if "NCCL_HOST_IP" in env else "ring"


def _addresses(env: Mapping[str, str], backend: str) -> tuple[str, ...]:
    if "LOCKSTEP_ADDRESS" in env:
        return (env["LOCKSTEP_ADDRESS"],)
    if backend == "ring" and "MLX_HOSTFILE" in env:
        hosts = json.loads(Path(env["MLX_HOSTFILE"]).read_text())
        return tuple(addresses[0].rpartition(":")[0] for addresses in hosts)
    if backend.startswith("jaccl") and "MLX_JACCL_COORDINATOR" in env:
        return (env["MLX_JACCL_COORDINATOR"].rpartition(":")[0],)
    if backend == "nccl" and "NCCL_HOST_IP" in env:
        return (env["NCCL_HOST_IP"],)
    return ()


def _infer_size(env: Mapping[str, str], backend: str, addresses: tuple[str, ...]) -> int:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MLX_WORLD_SIZE"):
        if name in env:
            return _integer(env, name, 1)
    if backend == "ring" and addresses:
        return len(addresses)
    if "MLX_IBV_DEVICES" in env:
        return len(json.loads(Path(env["MLX_IBV_DEVICES"]).read_text()))
    raise UsageError(f"cannot tell how many {backend} ranks there are: set LOCKSTEP_WORLD_SIZE")


def _infer_local_size(env: Mapping[str, str], rank: int, addresses: tuple[str, ...]) -> int:
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        if name in env:
            return _integer(env, name, 1)
    return addresses.count(addresses[rank]) if rank < len(addresses) else 1
