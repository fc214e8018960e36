"""From a checkpoint folder to this rank's evaluated slice of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lockstep.errors import LockstepError, UsageError
from lockstep.model.architectures import Support, support
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.cpu import fit_for_cpu
from lockstep.model.graph import parameters
from lockstep.model.loader import Loaded, evaluate, open_model
from lockstep.model.shard import Want
from lockstep.model.slices import SliceReader
from lockstep.model.tensor.collectives import Meeting, Rehearsal
from lockstep.model.tensor.needs import in_slices, needed
from lockstep.model.tensor.origins import Origin, Origins
from lockstep.model.tensor.pieces import Cut, Dropped, Piece
from lockstep.model.tensor.plan import TensorPlan, plan
from lockstep.model.whole import Whole


class TensorParallel(Whole):
    """This rank's slice of every layer, as a Shard: the same calls on every rank, in the same order.

    All ranks return logits, because they meet for them; so it must be the same on all ranks what is wanted,
    and whether it is evaluated.
    """

    def __init__(self, model: nn.Module, cut: TensorPlan, meeting: Meeting, batchable: bool = True) -> None:
        """Changes `model`, which must already hold this rank's slices."""
        cut.connect(model, meeting)
        self._meeting = meeting
        self._largest: mx.array | None = None
        super().__init__(model, batchable)

    def forward(self, tokens: mx.array, cache: list[Any], want: Want = "logits") -> mx.array:
        """Logits [rows, length, vocab] of `tokens` [rows, length]; the tokens when nothing is wanted."""
        self._meeting.argmax = want == "argmax"
        output = super().forward(tokens, cache, want)
        # Models whose head is not cut do not meet for logits.
        self._largest = self._meeting.take_largest()
        return output if self._largest is None else self._largest

    def broadcast(self, drawn: mx.array | None, output: mx.array) -> mx.array:
        """What rank 0 has drawn, on every rank; the ranks meet, unless they did so for these very tokens."""
        if self._largest is not None:
            return self._largest
        return self._meeting.broadcast(drawn, output)


@dataclass(frozen=True)
class Sliced(Loaded):
    """A loaded slice, with what was read from the files to get it."""

    bytes_read: int


@dataclass(frozen=True)
class Opened:
    """A model whose weights are still on disk, what this rank keeps of them, and where they come from."""

    model: nn.Module
    plan: TensorPlan
    cuts: Mapping[str, Cut]
    origins: Mapping[str, Origin]


def load(
    checkpoint: Checkpoint,
    weights: Sequence[float],
    group: mx.distributed.Group,
    *,
    wire: mx.Dtype | None = None,
    exchanged_bytes: int = 0,
    compact: bool = False,
    known: Support | None = None,
) -> Sliced:
    """This rank's part of the model in `checkpoint`, cut for ranks of these relative `weights`.

    Call `check` first, on every rank: a model that looks at its activations would wait here for the others.

    `wire` and `exchanged_bytes` are those of the Meeting in which sums are made; `compact` lets weights stay
    as stored on CPUs, too; `known` is taken instead of what the table of architectures says. Of a model on
    the Hub, the tensors that this rank keeps something of and that are not here are downloaded, and of those
    of which it keeps rows no others.

    Raises LockstepError for a checkpoint that lacks what this rank needs.
    """
    assert len(weights) == group.size(), f"{len(weights)} weights for {group.size()} ranks"
    known = known or support(checkpoint.config)
    opened = _open(checkpoint, weights, group.rank())
    if checkpoint.absent():
        fetched = checkpoint.fetch(*needed(opened.cuts, opened.origins, checkpoint))
        if fetched is not checkpoint:
            checkpoint, opened = fetched, _open(fetched, weights, group.rank())
    model, reader = opened.model, SliceReader(checkpoint)
    try:
        fill(model, opened.cuts, opened.origins, reader)
    except RuntimeError as error:
        raise LockstepError(
            f"cannot read the weights in {checkpoint.path}: {error}; fetch them again"
        ) from error
    fit_for_cpu(model, compact)
    shard = TensorParallel(model, opened.plan, Meeting(group, wire, exchanged_bytes), known.batch)
    weight_bytes = evaluate(model, frozenset(parameters(model)), checkpoint.path)
    return Sliced(shard, weight_bytes, reader.bytes_read)


def _open(checkpoint: Checkpoint, weights: Sequence[float], rank: int) -> Opened:
    origins = Origins()
    with checkpoint.opened() as folder:
        model, _, found = open_model(folder, origins.track)
    cut = plan(model, weights)
    if missing := sorted(cut.sizes.keys() - found):
        raise LockstepError(
            f"{checkpoint.path} has no tensor for {missing[0]}: the download is incomplete or config.json "
            "belongs to another model; fetch it again"
        )
    return Opened(model, cut, cut.cuts(rank), origins.of(parameters(model)))


def check(
    checkpoint: Checkpoint,
    weights: Sequence[float],
    group: mx.distributed.Group,
    known: Support | None = None,
) -> TensorPlan:
    """The cut of this model for all ranks, this rank's part of it tried without reading any weights.

    One rank may call this alone. Raises UsageError for a model or a number of ranks that cannot be cut.
    """
    (known or support(checkpoint.config)).check_tensor()
    with checkpoint.opened(hollow=True) as folder:
        model, config, _ = open_model(folder)
    cut = plan(model, weights)
    for name, piece in cut.cuts(group.rank()).items():
        owner, leaf = _owner(model, name)
        whole = owner.pop(leaf)
        if isinstance(piece, Piece):
            owner[leaf] = piece.of(whole)
    try:
        TensorParallel(model, cut, Rehearsal(group))
    except RuntimeError as error:  # what mlx raises for weights that are not there
        raise UsageError("it looks at its activations while it computes: use -n 1") from error
    except (ValueError, IndexError, TypeError) as error:
        raise UsageError(
            f"models of type {config['model_type']} do not run when cut for {len(weights)} tensor ranks "
            f"({error}): use --parallel pipeline"
        ) from error
    return cut


def fill(
    model: nn.Module, cuts: Mapping[str, Cut], origins: Mapping[str, Origin], reader: SliceReader
) -> None:
    """Give every parameter of `model` this rank's slice of it, one after the other."""
    # Nothing else may hold on to the whole parameters: some have to be evaluated to be cut.
    for name in list(parameters(model)):
        owner, leaf = _owner(model, name)
        cut = cuts.get(name)
        if isinstance(cut, Dropped):
            owner.pop(leaf)
            continue
        owner[leaf] = _read(owner[leaf], cut, origins[name], reader)
        mx.eval(owner[leaf])
        mx.clear_cache()


def _read(whole: mx.array, cut: Piece | None, origin: Origin, reader: SliceReader) -> mx.array:
    if in_slices(origin, reader):
        axis, ranges = (0, ()) if cut is None else (cut.axis, cut.ranges)
        parts = [reader.read(name, axis, ranges) for name in origin.tensors]
        return mx.stack(parts) if origin.how == "stacked" else parts[0]
    # The model makes this parameter from several tensors, or changes it: make it whole, keep the slice.
    reader.bytes_read += whole.nbytes
    return whole if cut is None else mx.contiguous(cut.of(whole))


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    *path, leaf = name.split(".")
    owner: Any = model
    for step in path:
        owner = owner[int(step)] if isinstance(owner, list) else owner[step]
    return owner, leaf
