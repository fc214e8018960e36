"""Attention blocks: recognised by the names and shapes of their projections, cut by key/value heads.

Anything that holds weights and is not understood makes the block unrecognised; it is then computed whole
on every rank, which is right, only not faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from lockstep.model.tensor import shares
from lockstep.model.tensor.pieces import (
    PER_HEAD,
    Cut,
    Piece,
    by_columns,
    by_heads,
    by_rows,
    columns_of,
    group_of,
    is_linear,
    rows_of,
)
from lockstep.model.tensor.shares import HeadShare, Range, scaled

QUERY = ("q_proj", "q_b_proj", "c_q", "attn_query")
KEY = ("k_proj", "c_k", "attn_key")
VALUE = ("v_proj", "c_v", "attn_value")
FUSED = ("qkv_proj", "q_k_v_proj", "query_key_value", "Wqkv", "wqkv", "c_attn", "att_proj")
OUTPUT = ("o_proj", "out_proj", "dense", "wo", "c_proj", "attn_resid", "attn_out")
GATE = ("gate_proj", "g_proj")
LATENT = "kv_a_proj_with_mqa"
LATENT_WHOLE = (LATENT, "kv_a_layernorm", "q_a_proj", "q_a_layernorm", "indexer")
LATENT_HEADS = ("embed_q", "unembed_out")
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm", "attn_sub_norm")
KEY_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
PER_QUERY_HEAD = ("sinks", "attention_sink_bias", "head_gain.head_g")

QUERY_COUNTS = ("n_heads", "num_heads", "num_attention_heads", "n_head", "q_num_heads")
KV_COUNTS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "k_num_heads", "v_num_heads")
RATIOS = ("repeats", "n_kv_groups", "num_key_value_groups", "n_group", "n_q_per_kv")
QUERY_SIZES = ("q_size", "q_proj_dim", "hidden_size", "d_model", "dim")
KV_SIZES = ("kv_size", "k_proj_dim", "v_proj_dim", "kv_dim")


@dataclass(frozen=True)
class Attention:
    """One recognised block. `query_heads` is a multiple of `kv_heads`, the units that are cut."""

    module: nn.Module
    query_heads: int
    kv_heads: int
    output: str
    width: int
    """Columns of the output projection per query head."""
    latent: bool = False
    """Multi-head latent attention: keys and values come from a latent that every rank holds whole."""
    spanning: tuple[str, ...] = ()
    """Norms over all heads together."""

    @property
    def per_kv(self) -> int:
        return self.query_heads // self.kv_heads

    def shares(self, weights: Sequence[float]) -> tuple[HeadShare, ...]:
        """Every rank's heads; raises UsageError when they cannot be cut for so many ranks."""
        return shares.heads(
            self.kv_heads, self.per_kv, weights, self.width, group_of(self.module[self.output])
        )

    def cuts(self, share: HeadShare, keep_bias: bool) -> Iterator[tuple[str, Cut]]:
        """The parameters that change, by name within the block."""
        query = self._query_ranges(share)
        for name, child in self.module.children().items():
            if name in FUSED:
                yield from _named(name, by_rows(child, self._fused_ranges(child, share)))
            elif name in QUERY or name in GATE or name == "kv_b_proj":
                width = rows_of(child) // self.query_heads
                yield from _named(name, by_rows(child, [scaled(r, width) for r in query]))
            elif name in KEY or name in VALUE:
                yield from _named(name, by_rows(child, [scaled(share.kv, rows_of(child) // self.kv_heads)]))
            elif name in LATENT_HEADS:
                yield from _named(name, by_heads(child, share.query))
            elif name == self.output:
                yield from _named(name, by_columns(child, [scaled(r, self.width) for r in query], keep_bias))
        yield from self._vectors(share, query)

    def resize(self, share: HeadShare) -> None:
        """Tell the module how many heads it has now."""
        query, kv = share.query[1] - share.query[0], share.kv[1] - share.kv[0]
        if self.latent:
            kv = query
        for names, old, new in (
            (RATIOS, self.per_kv, query // kv),
            (QUERY_SIZES, self.query_heads * self.width, query * self.width),
            (KV_SIZES, self.kv_heads * self.width, kv * self.width),
            (QUERY_COUNTS, self.query_heads, query),
            (KV_COUNTS, self.kv_heads, kv),
        ):
            for name in names:
                if getattr(self.module, name, None) == old:
                    setattr(self.module, name, new)

    def _vectors(self, share: HeadShare, query: list[Range]) -> Iterator[tuple[str, Cut]]:
        """Parameters with one entry, or one row, per head."""
        for name, value in tree_flatten(self.module.parameters()):
            owner = name.partition(".")[0]
            if name in PER_QUERY_HEAD:
                yield name, Piece(-1, tuple(query))
            elif name == "q_weight" or (owner in QUERY_NORMS and value.ndim == 2):
                yield name, Piece(-2, tuple(query))
            elif name == "k_weight" or (owner in KEY_NORMS and value.ndim == 2):
                yield name, Piece(-2, (share.kv,))
        for name in self.spanning:
            ranges = query if name in QUERY_NORMS else [share.kv]
            yield f"{name}.weight", Piece(-1, tuple(scaled(r, self.width) for r in ranges))

    def _query_ranges(self, share: HeadShare) -> list[Range]:
        """The query heads of this rank's key/value heads: neighbours, but for models that tile the keys."""
        tiles = getattr(getattr(self.module, "config", None), "n_shared_head", None)
        if tiles is None or "q_num_heads" not in self.module.__dict__:
            return [share.query]
        first, last = share.kv
        return [(tile * self.kv_heads + first, tile * self.kv_heads + last) for tile in range(tiles)]

    def _fused_ranges(self, child: nn.Module, share: HeadShare) -> list[Range]:
        if _grouped(self.module):
            return [scaled(share.kv, rows_of(child) // self.kv_heads)]
        query, kv = self.query_heads * self.width, self.kv_heads * self.width
        return [
            scaled(share.query, self.width),
            *(_moved(scaled(share.kv, self.width), start) for start in (query, query + kv)),
        ]


def recognise(module: nn.Module, claimed: frozenset[str] = frozenset()) -> Attention | None:
    """`module` as an attention block; None if it is none, or has weights that are not understood.

    `claimed` names children that another recogniser answers for.
    """
    children = module.children()
    outputs = [name for name in OUTPUT if name in children]
    query_heads = next(
        (getattr(module, n) for n in QUERY_COUNTS if isinstance(getattr(module, n, None), int)), 0
    )
    if len(outputs) != 1 or not query_heads or not is_linear(children[outputs[0]]):
        return None
    if not any(name in children for name in QUERY + FUSED) or _depends_on_head_numbers(module):
        return None
    latent = LATENT in children
    kv_heads = query_heads if latent else _kv_heads(module, query_heads)
    if not kv_heads or query_heads % kv_heads or columns_of(children[outputs[0]]) % query_heads:
        return None
    width = columns_of(children[outputs[0]]) // query_heads
    block = Attention(module, query_heads, kv_heads, outputs[0], width, latent)
    spanning = tuple(name for name in (*QUERY_NORMS, *KEY_NORMS) if _spans(block, name))
    block = replace(block, spanning=spanning)
    return block if _understood(block, claimed) else None


def _kv_heads(module: nn.Module, query_heads: int) -> int:
    for name in KV_COUNTS:
        if isinstance(count := getattr(module, name, None), int):
            return count
    children = module.children()
    key = next((children[name] for name in KEY if name in children), None)
    query = next((children[name] for name in QUERY if name in children), None)
    if any(name in children for name in FUSED):
        return query_heads
    if key is None or query is None:
        return 0  # keys of another block, of which nothing is known here
    return rows_of(key) * query_heads // rows_of(query)


def _understood(block: Attention, claimed: frozenset[str]) -> bool:
    for name, child in block.module.children().items():
        if name in claimed or not tree_flatten(child):
            continue
        if not _child_understood(block, name, child):
            return False
    own = (name for name, value in block.module.items() if isinstance(value, mx.array) and value.size > 1)
    return all(name in (*PER_QUERY_HEAD, "q_weight", "k_weight") for name in own if not name.startswith("_"))


def _child_understood(block: Attention, name: str, child: object) -> bool:
    if not isinstance(child, nn.Module):
        return False
    if name in FUSED:
        rows = (block.query_heads + 2 * block.kv_heads) * block.width
        return is_linear(child) and rows_of(child) == rows
    if name in QUERY or name in GATE or (block.latent and name == "kv_b_proj"):
        return is_linear(child) and rows_of(child) % block.query_heads == 0
    if name in KEY or name in VALUE:
        return is_linear(child) and rows_of(child) % block.kv_heads == 0
    if block.latent and (name in LATENT_WHOLE or name in LATENT_HEADS):
        return name in LATENT_WHOLE or type(child) in PER_HEAD
    if name in QUERY_NORMS or name in KEY_NORMS:
        return _norm_understood(block, name, child)
    # Applied to the block's input, which every rank has whole.
    return name in (block.output, "norm", "head_gain", "rope")


def _norm_understood(block: Attention, name: str, child: nn.Module) -> bool:
    heads = block.query_heads if name in QUERY_NORMS else block.kv_heads
    values = tree_flatten(child.parameters())
    if len(values) != 1:
        return False
    value = values[0][1]
    if value.ndim == 2:
        return bool(value.shape[0] == heads)
    # Otherwise it must be the norm of one head, and heads are never cut.
    return name in block.spanning or bool(value.size < heads * block.width) or heads == 1


def _spans(block: Attention, name: str) -> bool:
    heads = block.query_heads if name in QUERY_NORMS else block.kv_heads
    child = block.module.get(name)
    return heads > 1 and type(child) is nn.RMSNorm and child.weight.shape == (heads * block.width,)


def _grouped(module: nn.Module) -> bool:
    """Whether a fused projection has query, key and value of each group side by side, not in three parts."""
    children = module.children()
    if "wqkv" in children or hasattr(module, "n_q_per_kv"):
        return True
    return "query_key_value" in children and not any(hasattr(module, name) for name in KV_COUNTS)


def _depends_on_head_numbers(module: nn.Module) -> bool:
    """Blocks whose heads behave by their number, or that take the hidden size for that of all heads."""
    return bool(getattr(module, "block_sparse", False)) or type(module).__module__.endswith("models.exaone")


def _named(owner: str, cuts: Iterator[tuple[str, Cut]]) -> Iterator[tuple[str, Cut]]:
    return ((f"{owner}.{name}", cut) for name, cut in cuts)


def _moved(range_: Range, by: int) -> Range:
    return range_[0] + by, range_[1] + by
