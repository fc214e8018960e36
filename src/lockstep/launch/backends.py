"""What each mlx backend needs from a launcher: pure, from a job to one command per rank.

The variables are those of `mlx.launch` and of mlx's sources; `LOCKSTEP_*` is for our own runtime.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from math import inf

from lockstep.errors import LockstepError, UsageError
from lockstep.launch import environment, mpi, names
from lockstep.launch.hostfile import layer_counts
from lockstep.launch.job import Command, Job
from lockstep.runtime import beats
from lockstep.runtime.environment import BACKENDS

DEFAULT_PORT = 32323


@dataclass(frozen=True)
class _Share:
    """What a backend adds to one rank."""

    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[tuple[str, int], ...] = ()


def commands(job: Job) -> list[Command]:
    """The processes to start, rank 0 first; a single `mpirun` for the mpi backend.

    Raises UsageError when the hosts lack what the backend needs.
    """
    if not job.hosts:
        raise UsageError("no hosts to run on: give -n or a hostfile")
    if job.backend not in BACKENDS:
        raise UsageError(f"unknown backend {job.backend!r}: use one of {', '.join(BACKENDS)}")
    # mpi finds its hosts by their names; it is our own meeting of the ranks that needs an address then.
    if len(job.hosts) > 1 and (job.backend != "mpi" or any(host.ips for host in job.hosts)):
        _check_addresses(job)
    if job.backend == "mpi":
        return [mpi.command(job, common(job))]
    share = _SHARES[job.backend](job) if len(job.hosts) > 1 else lambda _: _Share()
    return [_command(job, rank, share(rank)) for rank in range(len(job.hosts))]


def common(job: Job) -> dict[str, str]:
    """Environment that all ranks share."""
    ours = {
        "PYTHONUNBUFFERED": "1",
        "LOCKSTEP_BACKEND": job.backend,
        "LOCKSTEP_WORLD_SIZE": str(len(job.hosts)),
    }
    if job.first_beat_s < inf:
        ours[beats.ENVIRONMENT] = "1"
    if all(host.ips for host in job.hosts):
        ours["LOCKSTEP_ADDRESS"] = job.hosts[0].ips[0]
    if counts := layer_counts(job.hosts):
        ours["LOCKSTEP_SPLIT"] = ",".join(map(str, counts))
    return environment.forwarded() | ours | dict(job.env)


def _command(job: Job, rank: int, share: _Share) -> Command:
    host = job.hosts[rank]
    local_size = sum(other.ssh == host.ssh for other in job.hosts)
    env = {"MLX_RANK": str(rank), "LOCKSTEP_LOCAL_SIZE": str(local_size)}
    if host.memory_gb is not None:
        env["LOCKSTEP_MEMORY_GB"] = f"{host.memory_gb:g}"
    return Command(
        rank,
        host,
        not names.is_local(host.ssh),
        (job.python, *job.argv),
        {**common(job), **env, **share.env, **job.env},
        share.files,
        share.ports,
    )


def _ring(job: Job) -> Callable[[int], _Share]:
    counts = [len(host.ips) for host in job.hosts]
    ports = iter(_ports(job, sum(counts)))
    addresses = [tuple((ip, next(ports)) for ip in host.ips) for host in job.hosts]
    hostfile = json.dumps([[f"{ip}:{port}" for ip, port in own] for own in addresses])
    return lambda rank: _Share(files={"MLX_HOSTFILE": hostfile}, ports=addresses[rank])


def _jaccl(job: Job) -> Callable[[int], _Share]:
    hosts, size = job.hosts, len(job.hosts)
    for rank, host in enumerate(hosts):
        if len(host.rdma) != size:
            raise UsageError(
                f'{job.backend} needs "rdma" with {size} entries for {host.ssh}, found {len(host.rdma)}: '
                "mlx.distributed_config writes them"
            )
        if host.rdma[rank] is not None:
            raise UsageError(f'"rdma" of {host.ssh} must be null at its own position {rank}')
        reached = (rank - 1, (rank + 1) % size) if job.backend == "jaccl-ring" else range(size)
        for other in reached:
            if other % size != rank and host.rdma[other] is None:
                raise UsageError(
                    f'{job.backend} needs an RDMA device from {host.ssh} to {hosts[other].ssh}: its "rdma" '
                    f"is null at position {other % size}"
                )
    coordinator = (hosts[0].ips[0], _ports(job, 1)[0])
    env = {"MLX_JACCL_COORDINATOR": f"{coordinator[0]}:{coordinator[1]}"}
    if job.backend == "jaccl-ring":
        env["MLX_JACCL_RING"] = "1"
    files = {"MLX_IBV_DEVICES": json.dumps([host.rdma for host in hosts])}
    return lambda rank: _Share(env, files, () if rank else (coordinator,))


def _nccl(job: Job) -> Callable[[int], _Share]:
    address = (job.hosts[0].ips[0], _ports(job, 1)[0])
    env = {
        "NCCL_HOST_IP": address[0],
        "NCCL_PORT": str(address[1]),
        "MLX_WORLD_SIZE": str(len(job.hosts)),
    }

    def share(rank: int) -> _Share:
        host = job.hosts[rank]
        place = sum(other.ssh == host.ssh for other in job.hosts[:rank])
        ours = os.environ.get("CUDA_VISIBLE_DEVICES", "") if names.is_local(host.ssh) else ""
        devices = [device for device in ours.split(",") if device]
        if devices and place >= len(devices):
            raise UsageError(
                f"nccl needs one GPU per rank, but CUDA_VISIBLE_DEVICES={ours} has {len(devices)}: "
                "start fewer ranks or use --backend ring"
            )
        device = devices[place] if devices else str(place)
        return _Share(env | {"CUDA_VISIBLE_DEVICES": device}, ports=() if rank else (address,))

    return share


_SHARES: Mapping[str, Callable[[Job], Callable[[int], _Share]]] = {
    "ring": _ring,
    "jaccl": _jaccl,
    "jaccl-ring": _jaccl,
    "nccl": _nccl,
}


def _check_addresses(job: Job) -> None:
    for host in job.hosts:
        if not host.ips:
            raise UsageError(f'{job.backend} needs an address of {host.ssh}: give its "ips" in the hostfile')
    inside = [host for host in job.hosts if all(ip_address(ip).is_loopback for ip in host.ips)]
    if inside and len(inside) < len(job.hosts):
        raise UsageError(
            f"{inside[0].ssh} has the address {inside[0].ips[0]}, which other machines cannot reach: "
            'give its "ips" in the hostfile'
        )


def _ports(job: Job, count: int) -> list[int]:
    """The ports of the data plane."""
    if job.port is not None or not all(names.is_local(host.ssh) for host in job.hosts):
        first = job.port or DEFAULT_PORT
        if not 1024 <= first <= 65536 - count:
            raise UsageError(
                f"--ring-port {first} leaves no room for {count} ports: use 1024 to {65536 - count}"
            )
        return list(range(first, first + count))
    # Below the range from which systems take ports for outgoing connections, so that they stay free.
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 1000):
        if len(found) == count:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    if len(found) < count:
        raise LockstepError(f"of the {count} ports that are needed, {len(found)} are free: give --ring-port")
    return found
