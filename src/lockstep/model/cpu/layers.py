"""Other classes for the layers that multiply by a matrix."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.nn as nn


def retype(model: nn.Module, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Give layers of `model` that are exactly of one of these kinds the class that stands beside it."""
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
