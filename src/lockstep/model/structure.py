"""How a model uses its layers, caches and weights, read from its lazy graph. Nothing is evaluated.

MLX arrays are promises until they are evaluated, so a forward pass over weights that are still on disk
costs no memory and yet shows everything: in which order the layers run, which cache belongs to which
layer, what crosses from one layer to the next, and which tensors an output needs. The pipeline and the
loader ask here instead of knowing architectures by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from lockstep.errors import UsageError
from lockstep.model.cache_parts import nodes
from lockstep.model.classes import become
from lockstep.model.graph import Graph, Place, arrays_in, parameters, put

# Two runs that differ in every size that can differ: (rows, length of the first pass, of the second).
# The second pass is the one whose shapes count: its caches are longer than its input.
RUNS = ((2, 5, 1), (3, 7, 2))
STEPS = (0, 1)


class CannotSplit(UsageError):
    """The model does not run its layers one after the other."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"this model cannot be split into stages: {reason}; use -n 1 or --parallel tensor")
        self.reason = reason


@dataclass(frozen=True)
class Leaf:
    """One array that a layer returns; a dimension is a number, "rows", "length", or None for neither."""

    place: Place
    shape: tuple[int | str | None, ...]
    dtype: mx.Dtype

    def sizes(self, rows: int, length: int) -> tuple[int, ...]:
        """The shape in a pass over tokens [rows, length]; a dimension that nobody can know counts as 1."""
        known = {"rows": rows, "length": length, None: 1}
        return tuple(d if isinstance(d, int) else known[d] for d in self.shape)


@dataclass(frozen=True)
class Result:
    """The form of what a layer returns: its arrays, and an example of everything else in it."""

    example: Any
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class Structure:
    """How a model runs, for any cut of its layers."""

    caches: tuple[Any, ...]
    """Fresh caches of one sequence, in the model's own order."""
    cache_layers: tuple[int | None, ...]
    """For each cache, the first layer that was given it; None when only code around the layers uses it."""
    cache_states: tuple[tuple[str, ...], ...]
    results: tuple[Result, ...]
    layer_tensors: tuple[frozenset[str], ...]
    """For each layer, the names of its parameters."""
    tensors: frozenset[str]
    vocab_size: int
    graph: Graph = field(repr=False)

    def boundary(self, cut: int) -> tuple[Leaf, ...]:
        """The arrays that travel when a stage ends before layer `cut`, 0 < cut < layers.

        Raises UsageError when the layers from `cut` on need more of the earlier ones than such arrays.
        """
        leaves = self._travelling(cut)
        if leaves is None:
            possible = ", ".join(map(str, self.cuts())) or "none"
            raise UsageError(
                f"this model cannot be split before layer {cut}: its later layers reuse what earlier layers "
                f"computed; a stage may begin at layer: {possible}"
            )
        return leaves

    def cuts(self) -> tuple[int, ...]:
        """Every layer that may be the first one of a stage, except layer 0."""
        return tuple(c for c in range(1, len(self.results)) if self._travelling(c) is not None)

    def parameters(self, first: int, last: int) -> frozenset[str]:
        """The names of the parameters that the stage with layers [first, last) computes with."""
        stop = self._returned(first - 1) if first else ()
        return self.tensors & self.graph.needs(self._sinks(first, last), stop)

    def _travelling(self, cut: int) -> tuple[Leaf, ...] | None:
        names = self._returned(cut - 1)
        needed = self.graph.needs(self._sinks(cut, len(self.results)), names)
        leaves = self.results[cut - 1].leaves
        used = tuple(
            leaf for i, leaf in enumerate(leaves) if any(_returned(s, cut - 1, i) in needed for s in STEPS)
        )
        leaks = any(not needed.isdisjoint(tensors) for tensors in self.layer_tensors[:cut])
        return None if leaks or any(None in leaf.shape for leaf in used) else used

    def _returned(self, layer: int) -> list[str]:
        return [_returned(s, layer, i) for s in STEPS for i in range(len(self.results[layer].leaves))]

    def _sinks(self, first: int, last: int) -> list[str]:
        """What the stage with layers [first, last) must compute: its caches, and what it passes on."""
        owners = [layer is None or first <= layer < last for layer in self.cache_layers]
        sinks = [name for i, own in enumerate(owners) if own for name in self.cache_states[i]]
        if last == len(self.results):
            return sinks + [_logits(s) for s in STEPS]
        places = {leaf.place for leaf in self.boundary(last)}
        leaves = self.results[last - 1].leaves
        return sinks + [
            _returned(s, last - 1, i) for s in STEPS for i, leaf in enumerate(leaves) if leaf.place in places
        ]


def observe(model: Module) -> Structure:
    """Run `model` lazily on small inputs and tell its structure. The model is left as it was.

    Raises CannotSplit when the model does not call each layer of `model.layers` once, in order, and when it
    evaluates what it computes, so that the graph is torn.
    """
    caches = make_prompt_cache(model)
    first, second = (_Run(model, copy.deepcopy(caches), *sizes) for sizes in RUNS)
    tensors = parameters(model)
    names = {id(array): name for name, array in tensors.items()}
    structure = Structure(
        caches=tuple(caches),
        cache_layers=tuple(first.cache_layers.get(i) for i in range(len(caches))),
        cache_states=tuple(map(tuple, first.cache_states)),
        results=tuple(_result(a, b) for a, b in zip(first.results, second.results, strict=True)),
        layer_tensors=tuple(
            frozenset(names[id(a)] for a in parameters(layer).values()) for layer in model.layers
        ),
        tensors=frozenset(tensors),
        vocab_size=first.vocab_size,
        graph=Graph(tensors | first.named),
    )
    used = structure.parameters(0, len(structure.results))
    if any(tensors and used.isdisjoint(tensors) for tensors in structure.layer_tensors):
        raise CannotSplit("it looks at its activations while it computes")
    return structure


class _Run:
    """Two forward passes in a row, with everything that layers are given and return."""

    def __init__(self, model: Module, caches: list[Any], rows: int, *lengths: int) -> None:
        self.cache_layers: dict[int, int] = {}
        self.cache_states: list[list[str]] = [[] for _ in caches]
        self.results: list[Any] = []
        self.named: dict[str, mx.array] = {}
        self._positions = {id(part): i for i, cache in enumerate(caches) for part in nodes(cache)}
        for self._step, length in enumerate(lengths):
            self.results.clear()
            with calls_seen(model.layers, self._saw):
                logits = model(mx.zeros((rows, length), mx.int32), cache=caches)
            if len(self.results) != len(model.layers):
                raise CannotSplit(
                    f"it calls {len(self.results)} of its {len(model.layers)} layers as a whole"
                )
            self.vocab_size = int(logits.shape[-1])
            self.named[_logits(self._step)] = mx.stop_gradient(logits)
            for i, cache in enumerate(caches):
                for place, array in arrays_in(cache.state):
                    name = f"pass {self._step} cache {i} state {place}"
                    self.named[name] = mx.stop_gradient(array)
                    self.cache_states[i].append(name)

    def _saw(self, layer: int, given: Sequence[Any], result: Any) -> Any:
        if layer != len(self.results):
            raise CannotSplit(f"it runs layer {layer} after layer {len(self.results) - 1}")
        for value in given:
            if id(value) in self._positions:
                self.cache_layers.setdefault(self._positions[id(value)], layer)
        # Own nodes, so that a name means what a layer returned even where it returned a cache's array.
        arrays = {place: mx.stop_gradient(array) for place, array in arrays_in(result)}
        self.named |= {_returned(self._step, layer, i): a for i, a in enumerate(arrays.values())}
        self.results.append(put(result, arrays))
        return put(result, arrays)


@contextmanager
def calls_seen(layers: Sequence[Module], saw: Callable[[int, Sequence[Any], Any], Any]) -> Iterator[None]:
    """While open, each call of a layer goes through `saw(index, arguments, result)`, which may replace it."""
    classes = [type(layer) for layer in layers]
    # A class waits for Python's collector: what was seen, and with it every weight, must not wait with it.
    watchers = [saw]
    for i, (layer, kind) in enumerate(zip(layers, classes, strict=True)):

        def call(self: Any, *args: Any, _i: int = i, _kind: type = kind, **kwargs: Any) -> Any:
            return watchers[0](_i, [*args, *kwargs.values()], _kind.__call__(self, *args, **kwargs))

        become(layer, __call__=call)
    try:
        yield
    finally:
        for layer, kind in zip(layers, classes, strict=True):
            object.__setattr__(layer, "__class__", kind)
        watchers.clear()


def _result(first: Any, second: Any) -> Result:
    places = dict(arrays_in(first))
    leaves = tuple(
        Leaf(place, _dims(a.shape, b.shape), a.dtype)
        for (place, a), (_, b) in zip(places.items(), arrays_in(second), strict=True)
    )
    return Result(put(first, dict.fromkeys(places)), leaves)


def _dims(first: Sequence[int], second: Sequence[int]) -> tuple[int | str | None, ...]:
    (rows, _, length), (other_rows, _, other_length) = RUNS
    kinds = {(rows, other_rows): "rows", (length, other_length): "length"}
    return tuple(a if a == b else kinds.get((a, b)) for a, b in zip(first, second, strict=True))


def _returned(step: int, layer: int, leaf: int) -> str:
    return f"pass {step} layer {layer} returned {leaf}"


def _logits(step: int) -> str:
    return f"pass {step} logits"
