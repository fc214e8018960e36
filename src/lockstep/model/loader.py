"""From a checkpoint folder to this rank's evaluated stage: only the tensors that the rank computes with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from lockstep.errors import LockstepError, UsageError
from lockstep.model.architectures import Support, support
from lockstep.model.checkpoint import Checkpoint
from lockstep.model.classes import Tensors, before_sanitize, subclass
from lockstep.model.cpu import fit_for_cpu, lay_out_for_cpu, settle_for_cpu
from lockstep.model.cpu.blocks import in_one_block
from lockstep.model.graph import Graph, parameters
from lockstep.model.pipeline import Stage, Transport
from lockstep.model.shard import Shard
from lockstep.model.structure import Structure, observe
from lockstep.model.whole import Whole

_LAYER = re.compile(r".*?\.\d+\.")
_UNIT = "unit "
"""Before its name in the graph, where it must differ from those of parameters."""


@dataclass(frozen=True)
class Loaded:
    """A shard that is ready to run, and what it took."""

    shard: Shard
    weight_bytes: int


@dataclass(frozen=True)
class Opened:
    """A model whose weights are still on disk, and the names of the parameters that were found there."""

    model: Module
    found: frozenset[str]


def load(
    checkpoint: Checkpoint,
    span: tuple[int, int],
    rank: int,
    size: int,
    transport: Transport | None = None,
    *,
    wire: mx.Dtype | None = None,
    compact: bool = False,
    known: Support | None = None,
) -> Loaded:
    """The layers [first, last) of the model in `checkpoint`, and what stands before or behind them.

    The stage reaches its neighbours over `transport`, which only one rank alone can do without. `wire` is the
    dtype of messages where ranks compute in different ones; `compact` lets weights stay as stored on CPUs,
    too. Peak memory is the shard plus its largest tensor. Of a model on the Hub, the tensors that this stage
    needs and that are not here are downloaded.
    `known` is taken instead of what the table of architectures says.

    Raises UsageError for a model that cannot be cut like this, LockstepError for a checkpoint that lacks
    what this rank needs.
    """
    known = known or support(checkpoint.config)
    if size > 1:
        known.check_pipeline()
    marks = {_unit(name): mx.zeros(()) for name in checkpoint.tensors} if checkpoint.absent() else {}
    opened = _open(checkpoint, compact, marks)
    with in_one_block():
        structure = observe(opened.model) if size > 1 else None
    needed = frozenset(parameters(opened.model))
    if structure is not None:
        check_span(structure, span, rank, size)
        needed = structure.parameters(*span)
    if marks:
        own = {name: array for name, array in parameters(opened.model).items() if name in needed}
        made_from = Graph(marks | own).needs(needed)
        checkpoint = checkpoint.fetch(name for name in checkpoint.tensors if _unit(name) in made_from)
        opened = _open(checkpoint, compact)
    _check_found(checkpoint.path, needed, opened.found)
    if structure is None:
        shard: Shard = Whole(opened.model, known.batch)
    else:
        assert transport is not None
        shard = Stage(opened.model, structure, span, transport, wire, known.batch)
    return Loaded(shard, evaluate(opened.model, needed, checkpoint.path, head=rank == 0))


def stages_may_begin(checkpoint: Checkpoint, known: Support | None = None) -> tuple[int, ...]:
    """The layers, but 0, that can be the first of a stage of this model; no weights are read.

    Raises UsageError for an architecture that is not known to work in a pipeline.
    """
    (known or support(checkpoint.config)).check_pipeline()
    return observe(_open(checkpoint).model).cuts()


def check_span(structure: Structure, span: tuple[int, int], rank: int, size: int) -> None:
    """Raises UsageError unless `span` can be the stage of `rank` in a chain of `size`."""
    first, last = span
    count = len(structure.results)
    if not 0 <= first < last <= count or (rank == 0) != (last == count) or (rank == size - 1) != (first == 0):
        raise UsageError(
            f"rank {rank} of {size} cannot have layers {first} to {last - 1} of {count}: "
            "rank 0 has the last layers and every rank at least one"
        )


def evaluate(model: Module, needed: frozenset[str], path: Path, head: bool = True) -> int:
    """Bring these parameters of `model` into memory as this device wants them; returns their bytes.

    `head` is False where no logits are made.

    One after the other, so that at most one, or those that lie together, is held twice.
    """
    first = lay_out_for_cpu(model, needed, head)
    held = parameters(model)
    own = {name: held[name] for name in [*first, *held] if name in needed}
    for name, array in own.items():
        try:
            mx.eval(array)
        except RuntimeError as error:
            raise LockstepError(f"cannot read {name} from {path}: {error}; fetch the file again") from error
        settle_for_cpu(array)
        mx.clear_cache()  # what a conversion left behind would count against the next tensor
    return sum(array.nbytes for array in own.values())


def open_model(
    path: Path, watch: Callable[[type], type] = lambda kind: kind
) -> tuple[Module, dict[str, Any], frozenset[str]]:
    """The model of folder `path` with its weights still on disk, its config, and the parameters it found.

    `watch` may replace the model's class by a subclass that looks on while the model is loaded.
    Raises UsageError for a model type that mlx-lm does not know or a config it cannot use, LockstepError
    for weights that do not belong to it.
    """
    from mlx_lm.utils import _get_classes, load_model

    found: dict[str, tuple[int, ...]] = {}
    expected: dict[str, tuple[int, ...]] = {}

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        base, args = _get_classes(config)
        kind: Any = watch(base)

        def load_weights(self: Any, read: list[tuple[str, mx.array]], strict: bool = True) -> Any:
            found.update({name: array.shape for name, array in read})
            expected.update({name: array.shape for name, array in parameters(self).items()})
            return kind.load_weights(self, read, strict=False)

        return subclass(kind, load_weights=load_weights), args

    try:
        model, config = load_model(path, lazy=True, strict=False, get_model_classes=classes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"mlx-lm cannot build the model in {path}: {error}") from error
    except RuntimeError as error:
        raise LockstepError(f"cannot read the weights in {path}: {error}; fetch them again") from error
    for name, shape in found.items():
        if name not in expected:
            raise LockstepError(f"{path} has a tensor {name} that its config.json has no place for")
        if shape != expected[name]:
            raise LockstepError(f"{name} in {path} has shape {shape}, config.json asks for {expected[name]}")
    return model, config, frozenset(found)


def _open(
    checkpoint: Checkpoint, compact: bool = False, marks: Mapping[str, mx.array] | None = None
) -> Opened:
    """`marks` has an array for each unit of tensors, to be found in the graph of whatever is made of them."""

    def mark(tensors: Tensors) -> Tensors:
        if not marks:
            return tensors
        return {name: mx.depends(array, marks[_unit(name)]) for name, array in tensors.items()}

    with checkpoint.opened() as folder:
        model, _, found = open_model(folder, lambda kind: before_sanitize(kind, mark))
    fit_for_cpu(model, compact)
    return Opened(model, found)


def _unit(tensor: str) -> str:
    """What is looked for in graphs together: the tensors of a layer, of which there may be thousands."""
    return _UNIT + (_LAYER.match(tensor) or [tensor])[0]


def _check_found(path: Path, needed: frozenset[str], found: frozenset[str]) -> None:
    missing = sorted(needed - found)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LockstepError(
            f"no file in {path} has {missing[0]}{more}: the download is incomplete, or config.json belongs "
            "to another model; fetch the model again"
        )
