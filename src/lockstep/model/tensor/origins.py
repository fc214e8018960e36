"""Which tensors of the checkpoint a parameter is made of, where it is simple enough to read only slices.

mlx-lm's models may rename tensors, stack one per expert, or compute with them, in code of their own. Here
the arrays themselves are followed: a parameter that is the very array of a tensor is read from its place,
whatever its name; one that stacks tensors is read from each of them; anything else is made whole first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from lockstep.model.classes import Tensors, before_sanitize
from lockstep.model.graph import Graph

_PARAMETER = "parameter "
"""Before a parameter's name in the graph, where it must differ from those of tensors."""


@dataclass(frozen=True)
class Origin:
    """The tensor that a parameter is ("same"), or those that it stacks along a new first axis, in order, or
    those that it is otherwise computed from."""

    tensors: tuple[str, ...]
    how: Literal["same", "stacked", "computed"] = "same"


class Origins:
    """Watches one model being loaded."""

    def __init__(self) -> None:
        self._arrays: dict[str, mx.array] = {}

    def track(self, kind: type) -> type:
        """A subclass of the model's class whose loading is watched."""

        def note(tensors: Tensors) -> Tensors:
            self._arrays = dict(tensors)
            return tensors

        return before_sanitize(kind, note)

    def of(self, parameters: Mapping[str, mx.array]) -> dict[str, Origin]:
        """The origins of all parameters; forgets the arrays, so that they can be freed."""
        names = {id(array): name for name, array in self._arrays.items()}
        found = {name: Origin((names[id(a)],)) for name, a in parameters.items() if id(a) in names}
        if others := {name: array for name, array in parameters.items() if name not in found}:
            found |= _made(others, self._arrays)
        self._arrays = {}
        return found


def _made(parameters: Mapping[str, mx.array], tensors: Mapping[str, mx.array]) -> dict[str, Origin]:
    """The origins of parameters that are other arrays than the tensors."""
    # In a node of its own: operations that change nothing leave an array two names, of which one is lost.
    own = {_PARAMETER + name: mx.depends(array, mx.zeros(())) for name, array in parameters.items()}
    graph = Graph({**tensors, **own})
    found = {}
    for name, array in parameters.items():
        _, (made, *_) = graph.made_by(_PARAMETER + name)
        if made in tensors:
            found[name] = Origin((made,))
        elif array.ndim > 2 and (order := _stacked(made, array.shape, graph, tensors)):
            found[name] = Origin(order, "stacked")
        else:
            found[name] = Origin(tuple(sorted(graph.needs([made]) & tensors.keys())), "computed")
    return found


def _stacked(
    name: str, shape: tuple[int, ...], graph: Graph, tensors: Mapping[str, mx.array]
) -> tuple[str, ...]:
    """The whole tensors that an array stacks along its first axis, if it does that and nothing else."""
    join, parts = graph.made_by(name)
    expanded = [graph.made_by(part) for part in parts]
    if join != "Concatenate" or any(kind != "ExpandDims" for kind, _ in expanded):
        return ()
    order = tuple(tensor for _, (tensor, *_) in expanded)
    shapes = [(len(order), *tensors[t].shape) if t in tensors else None for t in order]
    whole = all(graph.made_by(tensor)[0] == "Load" for tensor in order)
    # Two equal lengths in front do not tell which axis is the new one.
    if whole and shape[0] != shape[1] and all(each == shape for each in shapes):
        return order
    return ()
