"""The machines of a run, as values; hostfile_reader.py has what they are read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lockstep.errors import UsageError

MOST_RANKS = 256
"""On one machine."""

Rdma = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Host:
    """Where one rank runs. `ips` are addresses, never names, once a hostfile is loaded.

    `rdma` has one entry per rank: the device that reaches it, None for itself. `memory_gb` is what the rank
    may use, `layers` a count or a span (first, last + 1).
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[Rdma, ...] = ()
    memory_gb: float | None = None
    layers: tuple[int, int] | int | None = None


@dataclass(frozen=True)
class Hostfile:
    """The hosts, one per rank, with the backend and environment that the file asks for."""

    hosts: tuple[Host, ...]
    backend: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def layer_counts(hosts: Sequence[Host]) -> tuple[int, ...] | None:
    """Layers per rank, rank 0 first, where the hosts have them.

    Raises UsageError when spans are not in the pipeline's order: the last host has the first layers.
    """
    given = [host.layers for host in hosts if host.layers is not None]
    spans = [layers for layers in given if isinstance(layers, tuple)]
    if spans != sorted(spans, reverse=True):
        raise UsageError(
            f"layers {spans} are not in the pipeline's order: the last host holds layer 0 and the first "
            "host the last layers; reorder the hosts"
        )
    return tuple(n if isinstance(n, int) else n[1] - n[0] for n in given) or None


def local_hosts(n: int) -> tuple[Host, ...]:
    """`n` ranks on this machine."""
    return tuple(Host("localhost", ("127.0.0.1",)) for _ in range(n))
