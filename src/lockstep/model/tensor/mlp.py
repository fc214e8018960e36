"""Feed-forward blocks, dense or one per expert: recognised by their projections, cut by inner columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from lockstep.model.tensor import shares
from lockstep.model.tensor.pieces import (
    EXPERTS,
    Cut,
    Piece,
    by_columns,
    by_rows,
    columns_of,
    group_of,
    is_linear,
    rows_of,
)
from lockstep.model.tensor.shares import Range, scaled

PAIRS = (
    # Longer sets of inputs first: `w1, w3` also has a `w2`.
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("w1", "v1"), "w2"),
    (("w1", "w2"), "c_proj"),
    (("c_fc_0", "c_fc_1"), "c_proj"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("input_linear",), "output_linear"),
    (("proj_1",), "proj_2"),
    (("ff_proj",), "ff_out"),
    (("mlp_gate", "mlp_linear"), "mlp_resid"),
)
"""Projections into the inner columns, and the one back out of them."""

INNER_NORM = "ffn_sub_norm"
ROUTERS = ("gate", "router", "shared_expert_gate", "coefficient")


@dataclass(frozen=True)
class Mlp:
    """One recognised block: the rows of every `inputs` belong to the columns of `output`."""

    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    columns: int
    experts: bool
    """Whether this is a set of experts, one matrix each."""

    def shares(self, weights: Sequence[float]) -> tuple[Range, ...]:
        """Every rank's columns; raises UsageError when they cannot be cut for so many ranks."""
        return shares.columns(self.columns, weights, group_of(self.module[self.output]))

    def cuts(self, share: Range, keep_bias: bool) -> Iterator[tuple[str, Cut]]:
        """The parameters that change, by name within the block."""
        for name in self.inputs:
            for parameter, cut in by_rows(self.module[name], self._rows(self.module[name], share)):
                yield f"{name}.{parameter}", cut
        for parameter, cut in by_columns(self.module[self.output], [share], keep_bias):
            yield f"{self.output}.{parameter}", cut
        for name in self.spanning:
            yield f"{name}.weight", Piece(-1, (share,))

    @property
    def spanning(self) -> tuple[str, ...]:
        """Norms over all inner columns together."""
        return (INNER_NORM,) if INNER_NORM in self.module else ()

    def _rows(self, child: nn.Module, share: Range) -> list[Range]:
        if rows_of(child) == self.columns:
            return [share]
        if _interleaved(self.module):
            return [scaled(share, 2)]
        return [share, (share[0] + self.columns, share[1] + self.columns)]


def recognise(module: nn.Module, claimed: frozenset[str] = frozenset()) -> Mlp | None:
    """`module` as a feed-forward block; None if it is none, or has weights that are not understood."""
    children = module.children()
    for inputs, output in PAIRS:
        if output in children and all(name in children for name in inputs):
            if not all(is_linear(children[name]) for name in (*inputs, output)):
                return None
            last = children[output]
            block = Mlp(module, inputs, output, columns_of(last), type(last) in EXPERTS)
            return block if _understood(block, claimed) else None
    return None


def _understood(block: Mlp, claimed: frozenset[str]) -> bool:
    children = block.module.children()
    if getattr(block.module, "activation_sparsity", 0):
        return False  # its activation looks at all columns together
    factors = {rows_of(children[name]) / block.columns for name in block.inputs}
    if factors not in ({1.0}, {2.0}) or (factors == {2.0} and len(block.inputs) > 1):
        return False
    if factors == {2.0} and block.inputs == ("up_proj",) and not _interleaved(block.module):
        return False
    for name, child in children.items():
        known = name in (*block.inputs, block.output) or name in claimed
        if (
            not known
            and any(value.size > 1 for _, value in tree_flatten(child))
            and not _harmless(name, child)
        ):
            return False
    own = (value for value in block.module.values() if isinstance(value, mx.array))
    return bool(claimed) or all(value.size == 1 for value in own)


def _harmless(name: str, child: object) -> bool:
    """A norm of the block's input, or one that is known how to be cut."""
    return name == "norm" or (name == INNER_NORM and type(child) is nn.RMSNorm)


def _interleaved(module: nn.Module) -> bool:
    """Whether gate and value of a column are neighbouring rows of one projection."""
    return hasattr(module, "gegelu_limit")


def sums_experts(module: nn.Module, cut: frozenset[str]) -> bool:
    """Whether a mixture's output is a sum of its experts' outputs, so that one all_reduce of it is enough.

    `cut` names the children that are cut; everything else that holds weights must only choose or weigh
    experts, or its contribution would be summed once for every rank.
    """
    rest = [name for name, child in module.children().items() if name not in cut and tree_flatten(child)]
    return all(name in ROUTERS for name in rest)
