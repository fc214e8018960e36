"""`lockstep plan`: who would compute what."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lockstep.cli import options as o
from lockstep.errors import DoesNotFit
from lockstep.launch import planning
from lockstep.model.shortfall import gigabytes


def plan(
    ranks: o.Ranks = None,
    hostfile: o.Hosts = None,
    model: o.Model = None,
    split: o.Layers = "auto",
    context: o.Context = None,
) -> None:
    """Show which rank of a pipeline would compute which layers, without loading anything.

    The ranks themselves also measure how fast they are, and know before which layers the model can be cut.
    """
    proposal = planning.propose(planning.hosts(ranks, hostfile), model, split, context)
    proposed = proposal.plan
    table = Table("rank", "host", "layers", "weights", "KV cache", "memory", "left")
    for share in proposed.shares:
        sizes = (share.weight_bytes, share.kv_bytes, share.memory_bytes, share.free_bytes)
        first, end = share.span
        table.add_row(str(share.rank), share.host, f"{first}-{end - 1}", *map(gigabytes, sizes))
    weights = "in float32" if proposal.held == "float32" else "as stored"
    table.caption = f"{proposed.strategy} split, {proposed.context} tokens of context, weights {weights}"
    Console(highlight=False).print(table)
    if proposal.problem:
        raise DoesNotFit(proposal.problem)
