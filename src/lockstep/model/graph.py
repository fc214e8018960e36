"""The lazy graph of a computation: which named arrays an array was made from. Nothing is evaluated."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models.cache import _BaseCache

# An operation is written as its node, then its inputs, then its outputs; arrays are quoted, operations not.
_DOT = re.compile(r'^(?:\{ \d+ \[label ?=(\w+).*|"(.+)" -> \d+|\d+ -> "(.+)")$', re.M)

_QUOTED = re.compile(r'"([^"]+)"')
_MOST_NAMES = 1000  # the binding takes no more than 1024 keyword arguments

Place = tuple[int | str, ...]
"""Where an array sits in nested tuples and objects; () is the array itself."""


class Graph:
    """Who was computed from whom, among arrays that were given names."""

    def __init__(self, named: Mapping[str, mx.array]) -> None:
        arrays = list(named.values())
        plain = _dot(arrays, {})
        names: dict[str, str] = {}
        for some in _batches(named, _MOST_NAMES):
            # The same graph is written in the same order, whatever has a name.
            pairs = zip(_QUOTED.findall(plain), _QUOTED.findall(_dot(arrays, some)), strict=True)
            names |= {automatic: given for automatic, given in pairs if given in some}
        self._made_by: dict[str, tuple[str, list[str]]] = {}
        operation, inputs = "", list[str]()
        for label, source, target in _DOT.findall(plain):
            if label:  # calls of one compiled function share their node's id: only the order tells them apart
                operation, inputs = label, []
            elif source:
                inputs.append(names.get(source, source))
            else:
                self._made_by[names.get(target, target)] = operation, inputs

    def made_by(self, name: str) -> tuple[str, list[str]]:
        """The operation that made an array, and what from; "" for what was not computed."""
        return self._made_by.get(name, ("", []))

    def needs(self, names: Iterable[str], stop: Iterable[str] = ()) -> set[str]:
        """Everything `names` were computed from, themselves included, not looking behind those in `stop`."""
        seen: set[str] = set()
        stop = frozenset(stop)
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                if name not in stop:
                    todo += self.made_by(name)[1]
        return seen


def parameters(module: Module) -> dict[str, mx.array]:
    """The parameters of `module` by their dotted names, as the checkpoint has them."""
    named = tree_flatten(module.parameters())
    assert isinstance(named, list)
    return dict(named)


def arrays_in(tree: Any, place: Place = ()) -> Iterator[tuple[Place, mx.array]]:
    """The arrays in nested tuples, lists and plain objects of a model's own classes, with their places."""
    if isinstance(tree, mx.array):
        yield place, tree
    for key, item in _items(tree):
        yield from arrays_in(item, (*place, key))


def put(tree: Any, arrays: Mapping[Place, Any], place: Place = ()) -> Any:
    """A copy of `tree` with what `arrays` has at their places."""
    if place in arrays:
        return arrays[place]
    items = {key: put(item, arrays, (*place, key)) for key, item in _items(tree)}
    if isinstance(tree, (tuple, list)):
        return type(tree)(items.values())
    if items:
        tree = copy.copy(tree)
        vars(tree).update(items)
    return tree


def _items(tree: Any) -> Iterable[tuple[int | str, Any]]:
    if isinstance(tree, (tuple, list)):
        return enumerate(tree)
    own = type(tree).__module__.startswith("mlx_lm.models.") and not isinstance(tree, (Module, _BaseCache))
    return vars(tree).items() if own else ()


def _dot(arrays: Sequence[mx.array], named: Mapping[str, mx.array]) -> str:
    buffer = io.StringIO()
    mx.export_to_dot(buffer, list(arrays), **named)
    # Operations have labels in quotes; names are what is left.
    return buffer.getvalue().replace('label ="', "label =").replace('", shape', ", shape")


def _batches(named: Mapping[str, mx.array], size: int) -> Iterator[dict[str, mx.array]]:
    items = list(named.items())
    for i in range(0, len(items), size):
        yield dict(items[i : i + size])
