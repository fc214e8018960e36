"""One product for linear layers that multiply the same input, where an operation costs more than a few rows.

Queries, keys and values are three products of one input, gate and up projection two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.cpu.layout import lay_out
from lockstep.model.cpu.rows import FilledLinear
from lockstep.model.cpu.tiles import Tiled, TiledLinear, is_tiled

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def cpu_siblings(model: nn.Module, needed: Collection[str]) -> list[str]:
    """Join them, lazily, where all their parameters are `needed`; returns the names of these.

    The parameters keep their names and values.
    """
    joined: list[str] = []
    for path, parent in list(model.named_modules()):
        for names in SIBLINGS:
            layers = [parent[name] for name in names if name in parent]
            if len(layers) < len(names):
                continue
            leaves = [f"{path}.{name}.{leaf}".lstrip(".") for name in names for leaf in parent[name]]
            if all(leaf in needed for leaf in leaves) and _alike(layers):
                _Joint(layers)
                joined += leaves
    return joined


def _alike(layers: Sequence[nn.Module]) -> bool:
    first = layers[0]
    return type(first) in (nn.Linear, FilledLinear, TiledLinear) and all(
        type(layer) is type(first)
        and layer.keys() == first.keys() >= {"weight"}
        and layer.weight.shape[1] == first.weight.shape[1]
        for layer in layers
    )


class _Joint:
    """Layers that become parts of one. They are separate again once they turn out not to share inputs."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        outputs = [layer.weight.shape[0] for layer in layers]
        self._borders = list(accumulate(outputs[:-1]))
        self._whole = nn.Linear(1, 1, bias="bias" in layers[0])
        self._whole.__class__ = type(layers[0])
        lay_out(self._whole, [layer.weight for layer in layers])
        if "bias" in layers[0]:
            self._whole.bias = mx.concatenate([layer.bias for layer in layers])
        # Views, so that nothing is held twice.
        for leaf, whole in self._whole.items():
            borders = [border * whole.shape[0] // sum(outputs) for border in self._borders]
            for layer, own in zip(layers, mx.split(whole, borders), strict=True):
                layer[leaf] = own
        for layer in layers:
            layer.__class__ = _Part
            layer.joint = self
        self._input: mx.array | None = None
        self._due: dict[int, mx.array] = {}

    def output(self, layer: nn.Module, x: mx.array) -> mx.array:
        """Of this layer, made together with all others' when the first of them is called."""
        if x is not self._input or id(layer) not in self._due:
            if self._due:
                self._separate()
                return layer(x)  # type: ignore[no-any-return]
            outputs = mx.split(self._whole(x), self._borders, axis=-1)
            self._input, self._due = x, {id(key): out for key, out in zip(self._layers, outputs, strict=True)}
        output = self._due.pop(id(layer))
        if not self._due:
            self._input = None
        return output

    def _separate(self) -> None:
        for layer in self._layers:
            layer.__class__ = type(self._whole)
            # Tiles lie in one piece as they are.
            if not is_tiled(layer):
                lay_out(layer, [layer.weight])
            del layer.joint


class _Part(Tiled):
    """What one of them is while they are joined."""

    def __call__(self, x: mx.array) -> mx.array:
        joint: _Joint = self.joint
        return joint.output(self, x)
