"""What this rank's machine has: device, memory, speed and versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import socket
import time
from pathlib import Path

import mlx.core as mx
import psutil

from lockstep.model import hub
from lockstep.model.blas import BlasChoice
from lockstep.model.precision import computes_on_cpu
from lockstep.runtime.environment import RankEnvironment
from lockstep.runtime.messages import Hello
from lockstep.runtime.place import Place

VERSIONED = ("mlx", "mlx-lm", "mlx-lockstep")

_PROBE_ROWS = 4096


def hello(place: Place, path: Path) -> Hello:
    """This rank's introduction; `path` is the model's folder."""
    env = place.env
    return Hello(
        rank=env.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=_device(place.blas),
        float32=computes_on_cpu(),
        memory_bytes=env.memory_bytes or _free_memory_bytes(env),
        bytes_per_s=_read_speed(),
        versions={name: importlib.metadata.version(name) for name in VERSIONED},
        model=hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
        revision=path.name if hub.is_snapshot(path) else "",
    )


def _device(blas: BlasChoice) -> str:
    """What computes, in a few words; on CPU float32, with the BLAS that does the work."""
    name = mx.device_info(mx.default_device()).get("device_name", "")
    if not computes_on_cpu():
        return f"gpu {name}".strip()
    threads = {None: "", 1: ", 1 thread"}.get(blas.threads, f", {blas.threads} threads")
    return f"cpu {name}, float32 with {blas.name}{threads}"


def _free_memory_bytes(env: RankEnvironment) -> int:
    """This rank's part of what its device has free."""
    if computes_on_cpu():
        return psutil.virtual_memory().available // env.local_size
    # Ranks of one host share its GPU, except over nccl, which gives each its own.
    sharing = 1 if env.backend == "nccl" else env.local_size
    info = mx.device_info(mx.default_device())
    if "free_memory" in info:
        return int(info["free_memory"]) // sharing
    total = info.get("max_recommended_working_set_size") or info["memory_size"]
    return (int(total) - mx.get_active_memory()) // sharing


def _read_speed() -> float:
    """Bytes of weights that this device multiplies per second when it decodes one sequence: best of five."""
    weights, vector = mx.ones((_PROBE_ROWS, _PROBE_ROWS)), mx.ones((_PROBE_ROWS,))
    mx.eval(weights @ vector)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        mx.eval(weights @ vector)
        seconds.append(time.perf_counter() - began)
    return weights.nbytes / min(seconds)
