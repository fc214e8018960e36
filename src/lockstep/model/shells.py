"""Change what a call of one layer does, without touching its model's code or the names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_map

from lockstep.model.classes import become


def shell(layer: Module, returns: Callable[[], Any]) -> Module:
    """A stand-in with the plain attributes of `layer` and none of its weights; a call returns `returns()`."""
    stand_in = _without_weights(layer)
    become(stand_in, __call__=lambda self, *args, **kwargs: returns())
    return stand_in


def replace_layers(model: Module, new: Mapping[int, Module]) -> None:
    """Put new layers where those with these id()s are, in whatever lists the model keeps them."""
    found = set()
    for _, module in model.named_modules():
        for value in module.values():
            if isinstance(value, list):
                for i, item in enumerate(value):
                    if id(item) in new:
                        found.add(id(item))
                        value[i] = new[id(item)]
    assert found == new.keys(), "the model keeps its layers somewhere else than in lists"


def after(layer: Module, saw: Callable[[Any], None]) -> None:
    """Let `saw` see what each call of `layer` returns."""
    kind = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, *args, **kwargs)
        saw(result)
        return result

    become(layer, __call__=call)


def _without_weights(module: Module) -> Module:
    kind: Any = type(module)
    empty: Module = kind.__new__(kind)
    Module.__init__(empty)
    for name, value in vars(module).items():
        object.__setattr__(empty, name, value)

    def strip(value: Any) -> Any:
        if isinstance(value, Module):
            return _without_weights(value)
        return None if isinstance(value, mx.array) else value

    for name, value in module.items():
        empty[name] = tree_map(strip, value, is_leaf=lambda v: isinstance(v, Module))
    return empty
