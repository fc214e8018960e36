"""Which parts of a model are cut, for all ranks: from names, shapes and weights per rank. Reads no weights.

Whatever is not recognised is computed whole on every rank: right, only not faster. A model of which nothing
is recognised is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.nn as nn

from lockstep.errors import UsageError
from lockstep.model.graph import parameters
from lockstep.model.tensor import attention, mlp, shares
from lockstep.model.tensor.attention import Attention
from lockstep.model.tensor.collectives import Meeting, reduce_together, span_norm, split_embedding, split_head
from lockstep.model.tensor.mlp import Mlp
from lockstep.model.tensor.pieces import EMBEDDING, Cut, Piece, by_rows, is_linear, rows_of
from lockstep.model.tensor.shares import HeadShare, Range

NATIVE = "sharding_group"
"""Attribute of mlx-lm's own mixtures: the group over which they sum, at the right place."""
PARALLEL = ("cohere", "cohere2", "gptj", "phi", "phixtral", "plamo")
"""Models whose layers only add up the outputs of attention and feed-forward: one all_reduce is enough."""
PARALLEL_FLAG = "use_parallel_residual"
ADDED = (("block_sparse_moe", "shared_mlp"),)
"""Children of a layer whose outputs are only added up."""


@dataclass(frozen=True)
class TensorPlan:
    """Every rank's part of every module that is cut, by the module's path in the model."""

    attentions: dict[str, tuple[Attention, tuple[HeadShare, ...]]]
    mlps: dict[str, tuple[Mlp, tuple[Range, ...]]]
    tables: dict[str, tuple[nn.Module, tuple[Range, ...]]]
    """Embeddings and heads, cut by vocabulary."""
    mixtures: frozenset[str]
    """Mixtures of experts that are reduced once, after everything in them has been added up."""
    sizes: dict[str, tuple[tuple[int, ...], int]] = field(repr=False)
    """Shape and bytes of every parameter, cut or not, as it is stored."""

    def cuts(self, rank: int) -> dict[str, Cut]:
        """What `rank` keeps of every parameter that it does not hold whole. Rank 0 adds the biases."""
        return dict(self._cuts(rank))

    def held_bytes(self, rank: int) -> int:
        """Bytes of weights that `rank` holds, as they are stored."""
        cuts = self.cuts(rank)
        total = 0
        for name, (shape, nbytes) in self.sizes.items():
            cut = cuts.get(name)
            if cut is None:
                total += nbytes
            elif isinstance(cut, Piece):
                total += nbytes * cut.size // shape[cut.axis]
        return total

    def connect(self, model: nn.Module, meeting: Meeting) -> None:
        """Make the cut modules of `model`, which holds its slices by now, communicate."""
        rank, modules = meeting.group.rank(), dict(model.named_modules())
        for block, head_shares in self.attentions.values():
            for name in block.spanning:
                heads = block.query_heads if name in attention.QUERY_NORMS else block.kv_heads
                span_norm(block.module[name], heads * block.width, meeting)
            block.resize(head_shares[rank])
        for mlp_block, _ in self.mlps.values():
            for name in mlp_block.spanning:
                span_norm(mlp_block.module[name], mlp_block.columns, meeting)
        for paths in self.sums(modules, natively=meeting.wire is None):
            if hasattr(modules[paths[0]], NATIVE):
                setattr(modules[paths[0]], NATIVE, meeting.native)
            else:
                reduce_together([modules[path] for path in paths], meeting)
        for path, (_, ranges) in self.tables.items():
            split = split_embedding if isinstance(modules[path], EMBEDDING) else split_head
            split(modules[path], ranges, meeting)

    def sums(self, modules: dict[str, nn.Module], natively: bool) -> list[list[str]]:
        """The modules whose outputs are partial sums; those in one list share one all_reduce.

        `natively` lets mixtures that know how sum by themselves, in the dtype they compute in.
        """
        mixtures = [path for path in sorted(self.mixtures) if natively or not hasattr(modules[path], NATIVE)]
        outputs = [_join(path, block.output) for path, (block, _) in self.attentions.items()]
        outputs += [
            _join(path, block.output)
            for path, (block, _) in self.mlps.items()
            if path.rpartition(".")[0] not in mixtures
        ]
        together: dict[str, list[str]] = {}
        for path in [*outputs, *mixtures]:
            native = hasattr(modules[path], NATIVE)
            together.setdefault(path if native else _sum_name(path, modules), []).append(path)
        return list(together.values())

    def _cuts(self, rank: int) -> Iterator[tuple[str, Cut]]:
        adds_bias = rank == 0
        for path, (block, head_shares) in self.attentions.items():
            yield from _below(path, block.cuts(head_shares[rank], adds_bias))
        for path, (mlp_block, column_shares) in self.mlps.items():
            yield from _below(path, mlp_block.cuts(column_shares[rank], adds_bias))
        for path, (table, ranges) in self.tables.items():
            yield from _below(path, by_rows(table, [ranges[rank]]))


def plan(model: nn.Module, weights: Sequence[float]) -> TensorPlan:
    """Cut `model` for ranks of these relative weights; the model itself stays as it is.

    Raises UsageError when heads or columns cannot be cut for so many ranks, or when nothing in the layers
    is of a kind that can be cut at all.
    """
    modules = dict(model.named_modules())
    layers = {id(module) for layer in model.layers for module in layer.modules()}
    attentions, mlps = {}, {}
    for path, module in modules.items():
        if id(module) not in layers:
            continue
        mlp_names = next(
            ({*i, o} for i, o in mlp.PAIRS if o in module and all(n in module for n in i)), set()
        )
        if block := attention.recognise(module, frozenset(mlp_names)):
            attentions[path] = block, block.shares(weights)
        claimed = frozenset(module.children()) - mlp_names if block else frozenset()
        if feed_forward := mlp.recognise(module, claimed):
            mlps[path] = feed_forward, feed_forward.shares(weights)
    if not attentions and not mlps:
        raise UsageError(
            "no layer of this model has attention or feed-forward parts that are known how to be cut: "
            "use --parallel pipeline"
        )
    return TensorPlan(
        attentions=attentions,
        mlps=mlps,
        tables=_tables(modules, layers, weights),
        mixtures=_mixtures(modules, mlps),
        sizes={name: (array.shape, array.nbytes) for name, array in parameters(model).items()},
    )


def _tables(
    modules: dict[str, nn.Module], layers: set[int], weights: Sequence[float]
) -> dict[str, tuple[nn.Module, tuple[Range, ...]]]:
    outside = {path: module for path, module in modules.items() if id(module) not in layers}
    vocabulary = max((rows_of(m) for m in outside.values() if type(m) in EMBEDDING), default=0)
    return {
        path: (module, shares.columns(vocabulary, weights))
        for path, module in outside.items()
        if (type(module) in EMBEDDING or is_linear(module)) and rows_of(module) == vocabulary
    }


def _mixtures(
    modules: dict[str, nn.Module], mlps: dict[str, tuple[Mlp, tuple[Range, ...]]]
) -> frozenset[str]:
    found = set()
    for path, (block, _) in mlps.items():
        owner = path.rpartition(".")[0]
        if block.experts and owner not in found:
            cut = frozenset(p.rpartition(".")[2] for p in mlps if p.rpartition(".")[0] == owner)
            if mlp.sums_experts(modules[owner], cut):
                found.add(owner)
    return frozenset(found)


def _sum_name(path: str, modules: dict[str, nn.Module]) -> str:
    """The same for all partial sums that the model's code only adds up."""
    steps = path.split(".")
    for length in range(1, len(steps)):
        owner = ".".join(steps[:length])
        layer = modules.get(owner)
        if layer is None or not steps[length - 1].isdigit():
            continue
        kind = type(layer).__module__.rpartition(".")[2]
        if kind in PARALLEL or getattr(layer, PARALLEL_FLAG, False):
            return owner
        if any(steps[length] in names and all(n in layer for n in names) for names in ADDED):
            return f"{owner}:added"
    return path


def _below(path: str, cuts: Iterator[tuple[str, Cut]]) -> Iterator[tuple[str, Cut]]:
    return ((_join(path, name), cut) for name, cut in cuts)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
