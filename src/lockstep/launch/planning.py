"""The partition as it can be known before any rank is started: without mlx and without loading anything."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import psutil

from lockstep.errors import DoesNotFit, UsageError
from lockstep.launch import names
from lockstep.launch.hostfile import Host, Hostfile, layer_counts, local_hosts
from lockstep.launch.hostfile_reader import load_hostfile
from lockstep.model import checkpoint, partition
from lockstep.model.blas import cuda_build
from lockstep.model.cache import expanded
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.costs import max_context
from lockstep.model.parallel import NO_PIPELINE, check_pipeline
from lockstep.model.quantized import Held
from lockstep.model.shortfall import shortfall
from lockstep.runtime.options import ModelOptions

UNKNOWN_BYTES = 1 << 60
"""Stands for memory that nobody has told us, of another machine or of a card: enough for anything."""


def hosts(ranks: int | None, hostfile: Path | None) -> Hostfile:
    """The hosts of a run: those of the hostfile, or this machine `ranks` times.

    Raises UsageError for a hostfile that is broken or has another number of ranks.
    """
    if hostfile is None:
        return Hostfile(local_hosts(ranks or 1))
    found = load_hostfile(hostfile)
    if ranks not in (None, len(found.hosts)):
        raise UsageError(f"-n {ranks}, but {hostfile} has {len(found.hosts)} ranks: give one of the two")
    return found


@dataclass(frozen=True)
class Proposal:
    """Who would compute what, holding it in what form, and why it does not fit, if it does not."""

    plan: partition.Plan
    held: Held
    problem: str | None


def propose(hosts: Hostfile, model: str | None, split: str, context: int | None) -> Proposal:
    """What the ranks would agree on if they were equally fast and any layer could begin a stage.

    They measure the one and ask the model for the other, which takes mlx (see runtime/division.py). The
    memory of another machine is its `memory_gb`. Raises UsageError when that is missing, or when the
    model cannot be cut as asked.
    """
    for host in hosts.hosts:
        if host.memory_gb is None and _memory_bytes(host, hosts) == UNKNOWN_BYTES:
            name = f"the GPU of {host.ssh}" if names.is_local(host.ssh) else host.ssh
            raise UsageError(f"the memory of {name} is not known here: give its memory_gb in the hostfile")
    return _propose(hosts, _inspect(model), split, context)


def check_backend(hosts: Hostfile, backend: str, parallel: str) -> None:
    """Refuse now what the ranks' mlx would refuse later. Raises UsageError."""
    if parallel == "pipeline":
        check_pipeline(backend, len(hosts.hosts))
    if backend not in NO_PIPELINE or len(hosts.hosts) == 1:
        return
    if all(names.is_local(host.ssh) for host in hosts.hosts) and not cuda_build():
        raise UsageError(
            f"{backend} needs NVIDIA cards, but the mlx of this machine is not the one for CUDA: "
            "use --backend ring"
        )


def check(hosts: Hostfile, options: ModelOptions) -> None:
    """Refuse now what every rank would refuse later. A model that is only on other machines is left to them.

    Raises UsageError.
    """
    _, numbers = _split(hosts, options.split)
    n = len(hosts.hosts)
    if options.parallel == "tensor" and n == 1 and options.split not in get_args(partition.Strategy):
        raise UsageError(
            f"--split {options.split} gives parts of every layer to ranks, but there is 1: leave it out"
        )
    if options.parallel == "tensor" and numbers is not None and (len(numbers) != n or min(numbers) < 1):
        raise UsageError(f"--split {options.split}: give {n} numbers above 0, one for each rank")
    if not all(names.is_local(host.ssh) for host in hosts.hosts) and not _known_here(options.model):
        return
    found = _inspect(options.model)
    checkpoint.check_tokenizer(found.path)
    most = max_context(found.config)
    if options.context is not None and options.context > most:
        raise UsageError(f"--context {options.context} is more than the {most} tokens of this model")
    if options.parallel != "tensor" and (
        problem := _propose(hosts, found, options.split, options.context).problem
    ):
        raise DoesNotFit(problem)


def _inspect(model: str | None) -> Checkpoint:
    return checkpoint.inspect(checkpoint.resolve(model))


def _propose(hosts: Hostfile, found: Checkpoint, split: str, context: int | None) -> Proposal:
    resources = [partition.RankResources(_memory_bytes(host, hosts), host.ssh) for host in hosts.hosts]
    strategy, numbers = _split(hosts, split)
    tokens = min(context or partition.DEFAULT_CONTEXT, max_context(found.config))
    for held in _forms():
        costs = checkpoint.costs(found, held)
        plan = partition.propose(costs, resources, strategy, numbers, tokens)
        if plan.fits:
            return Proposal(plan, held, None)
    return Proposal(plan, held, shortfall(costs, resources, plan))


def _forms() -> tuple[Held, ...]:
    """In which ranks like this machine hold a model: the first that fits."""
    on_gpu = sys.platform == "darwin" or cuda_build()
    return ("stored",) if on_gpu else ("float32", "compact")


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
    return model is None or expanded(model).is_dir()
