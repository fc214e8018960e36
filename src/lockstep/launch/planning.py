"""The partition as it can be known before any rank is started: without mlx and without loading anything."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from lockstep.errors import UsageError
from lockstep.launch import names
from lockstep.launch.hostfile import Host, Hostfile, layer_counts, load_hostfile, local_hosts
from lockstep.model import checkpoint, partition
from lockstep.model.blas import cuda_build
from lockstep.model.costs import ModelCosts
from lockstep.runtime.options import ModelOptions

UNKNOWN_BYTES = 1 << 60
"""Stands for memory that nobody has told us, of another machine or of a card: enough for anything."""


def hosts(ranks: int, hostfile: Path | None) -> Hostfile:
    """The hosts of a run: those of the hostfile, or this machine `ranks` times."""
    return load_hostfile(hostfile) if hostfile else Hostfile(local_hosts(ranks))


def propose(
    hosts: Hostfile, model: str | None, split: str, context: int | None
) -> tuple[partition.Plan, str | None]:
    """Who would compute what, and why it does not fit, if it does not.

    The memory of another machine is its `memory_gb`. Raises UsageError when that is missing, or when the
    model cannot be cut as asked.
    """
    for host in hosts.hosts:
        if host.memory_gb is None and _memory_bytes(host, hosts) == UNKNOWN_BYTES:
            name = f"the GPU of {host.ssh}" if names.is_local(host.ssh) else host.ssh
            raise UsageError(f"the memory of {name} is not known here: give its memory_gb in the hostfile")
    costs = _costs(model)
    resources = [partition.RankResources(_memory_bytes(host, hosts), host.ssh) for host in hosts.hosts]
    strategy, numbers = _split(hosts, split)
    tokens = min(context or partition.DEFAULT_CONTEXT, costs.max_context)
    proposed = partition.propose(costs, resources, strategy, numbers, tokens)
    return proposed, None if proposed.fits else partition.shortfall(costs, resources, proposed)


def check(hosts: Hostfile, options: ModelOptions) -> None:
    """Refuse now what every rank would refuse later. A model that is only on other machines is left to them.

    Raises UsageError.
    """
    strategy, numbers = _split(hosts, options.split)
    n = len(hosts.hosts)
    if options.parallel == "tensor" and numbers is not None and (len(numbers) != n or min(numbers) < 1):
        raise UsageError(f"--split {options.split}: give {n} numbers above 0, one for each rank")
    if not all(names.is_local(host.ssh) for host in hosts.hosts) and not _known_here(options.model):
        return
    costs = _costs(options.model)
    context = options.context
    if context is not None and context > costs.max_context:
        raise UsageError(f"--context {context} is more than the {costs.max_context} tokens of this model")
    if options.parallel != "tensor":
        resources = [partition.RankResources(_memory_bytes(host, hosts), host.ssh) for host in hosts.hosts]
        tokens = min(context or partition.DEFAULT_CONTEXT, costs.max_context)
        partition.plan(costs, resources, strategy, numbers, tokens)


def _costs(model: str | None) -> ModelCosts:
    on_gpu = sys.platform == "darwin" or cuda_build()
    return checkpoint.costs(checkpoint.inspect(checkpoint.resolve(model)), float32=not on_gpu)


def _split(hosts: Hostfile, split: str) -> tuple[partition.Strategy, tuple[int, ...] | None]:
    strategy, numbers = partition.parse_split(split)
    return strategy, numbers or (layer_counts(hosts.hosts) if split == "auto" else None)


def _memory_bytes(host: Host, hosts: Hostfile) -> int:
    if host.memory_gb is not None:
        return int(host.memory_gb * 1e9)
    if not names.is_local(host.ssh) or cuda_build():
        return UNKNOWN_BYTES
    return psutil.virtual_memory().available // sum(names.is_local(other.ssh) for other in hosts.hosts)


def _known_here(model: str | None) -> bool:
    return model is None or Path(model).expanduser().is_dir()
