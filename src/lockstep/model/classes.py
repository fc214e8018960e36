"""Classes of their own for single modules, which change what these do and neither their names nor weights.

Python looks methods like `__call__` up in the class, not in the object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

Tensors = dict[str, mx.array]


def subclass(kind: type, **methods: Callable[..., Any]) -> type:
    """A class like `kind`, under the same name, but for these methods."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def before_sanitize(kind: Any, look: Callable[[Tensors], Tensors]) -> type:
    """A model's class that gives all tensors of its checkpoint to `look`, and takes what that returns."""

    def sanitize(self: Any, tensors: Tensors) -> Tensors:
        tensors = look(tensors)
        renamed: Tensors = kind.sanitize(self, tensors) if hasattr(kind, "sanitize") else tensors
        return renamed

    return subclass(kind, sanitize=sanitize)


def become(module: Module, **methods: Callable[..., Any]) -> None:
    """Give `module` a subclass of its class with these methods."""
    # Past the module's own __setattr__, which takes what is assigned for a parameter or an attribute.
    object.__setattr__(module, "__class__", subclass(type(module), **methods))
