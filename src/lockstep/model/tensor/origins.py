"""Which tensors of the checkpoint a parameter is made of, where it is simple enough to read only slices.

mlx-lm's models may rename tensors, stack one per expert, or compute with them, in code of their own. Here
the arrays themselves are followed: a parameter that is the very array of a tensor is read from its place,
whatever its name; one that stacks tensors is read from each of them; anything else is made whole first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.classes import subclass
from lockstep.model.graph import Graph

_PARAMETER = "parameter "
"""Before a parameter's name in the graph, where it must differ from those of tensors."""


@dataclass(frozen=True)
class Origin:
    """The tensor that a parameter is, or the tensors that it stacks along a new first axis, in order."""

    tensors: tuple[str, ...]
    stacked: bool = False


class Origins:
    """Watches one model being loaded."""

    def __init__(self) -> None:
        self._arrays: dict[str, mx.array] = {}

    def track(self, kind: type[nn.Module]) -> type[nn.Module]:
        """A subclass of the model's class whose loading is watched."""
        if not hasattr(kind, "sanitize"):
            return subclass(kind, load_weights=self._watch(kind.load_weights))
        return subclass(kind, sanitize=self._watch(kind.sanitize))

    def _watch(self, method: Any) -> Any:
        def watched(model: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
            self._arrays = dict(weights)
            return method(model, weights, *args, **kwargs)

        return watched

    def of(self, parameters: Mapping[str, mx.array]) -> dict[str, Origin]:
        """The origins that are known; forgets the arrays, so that they can be freed."""
        names = {id(array): name for name, array in self._arrays.items()}
        found = {name: Origin((names[id(a)],)) for name, a in parameters.items() if id(a) in names}
        others = {name: a for name, a in parameters.items() if name not in found and a.ndim > 2}
        if others:
            found |= _stacks(others, self._arrays)
        self._arrays = {}
        return found


def _stacks(parameters: Mapping[str, mx.array], tensors: Mapping[str, mx.array]) -> dict[str, Origin]:
    """Those parameters that stack whole tensors along their first axis, and nothing else."""
    graph = Graph({**tensors, **{_PARAMETER + name: array for name, array in parameters.items()}})
    found = {}
    for name, array in parameters.items():
        join, parts = graph.made_by(_PARAMETER + name)
        expanded = [graph.made_by(part) for part in parts]
        if join != "Concatenate" or any(kind != "ExpandDims" for kind, _ in expanded):
            continue
        order = tuple(tensor for _, (tensor, *_) in expanded)
        shapes = [(len(order), *tensors[t].shape) if t in tensors else None for t in order]
        whole = all(graph.made_by(tensor)[0] == "Load" for tensor in order)
        # Two equal lengths in front do not tell which axis is the new one.
        if whole and array.shape[0] != array.shape[1] and all(shape == array.shape for shape in shapes):
            found[name] = Origin(order, stacked=True)
    return found
