"""Which tensors of the checkpoint a parameter is made of, where it is simple enough to read only slices.

mlx-lm's models may rename tensors, stack one per expert, or compute with them, in code of their own. Here
the arrays themselves are followed: a parameter that is the very array of a tensor is read from its place,
whatever its name; one that stacks tensors is read from each of them; anything else is made whole first.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_STACK = "the stack"


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
            return type(kind.__name__, (kind,), {"load_weights": self._watch(kind.load_weights)})
        return type(kind.__name__, (kind,), {"sanitize": self._watch(kind.sanitize)})

    def _watch(self, method: Any) -> Any:
        def watched(model: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
            self._arrays = dict(weights)
            return method(model, weights, *args, **kwargs)

        return watched

    def of(self, parameters: Mapping[str, mx.array]) -> dict[str, Origin]:
        """The origins that are known; forgets the arrays, so that they can be freed."""
        names = {id(array): name for name, array in self._arrays.items()}
        found = {}
        for name, array in parameters.items():
            if id(array) in names:
                found[name] = Origin((names[id(array)],))
            elif array.ndim > 2 and (stacked := _stacked(array, self._arrays)):
                found[name] = Origin(stacked, stacked=True)
        self._arrays = {}
        return found


def _stacked(array: mx.array, tensors: Mapping[str, mx.array]) -> tuple[str, ...] | None:
    """The tensors that `array` stacks along its first axis, in order; None if it is anything else."""
    count, *shape = array.shape
    named = {n: t for n, t in tensors.items() if [*t.shape] == shape and t.dtype == array.dtype}
    if len(named) < count or count == shape[0]:
        return None
    buffer = io.StringIO()
    mx.export_to_dot(buffer, array, **named, **{_STACK: array})
    text = buffer.getvalue()
    kinds = dict(re.findall(r'\{ (\d+) \[label ?="(\w+)"', text))
    sources: dict[str, list[str]] = {}
    for source, target in re.findall(r'^"?([^"\n]+?)"? -> "?([^"\n]+?)"?$', text, re.M):
        sources.setdefault(target, []).append(source)

    def made_by(value: str) -> tuple[str, list[str]]:
        """The operation that made a value, and its arguments."""
        operation = sources.get(value, [""])[0]
        return kinds.get(operation, ""), sources.get(operation, [])

    join, parts = made_by(_STACK)
    expanded = [made_by(part) for part in parts]
    if join != "Concatenate" or any(kind != "ExpandDims" for kind, _ in expanded):
        return None
    order = [tensor for _, (tensor, *_) in expanded]
    whole = all(name in named and made_by(name)[0] == "Load" for name in order)
    return tuple(order) if whole and len(order) == count else None
