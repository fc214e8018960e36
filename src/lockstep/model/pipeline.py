"""One stage of a model whose layers are spread over ranks, for any mlx-lm model and without its code.

The model keeps all its layers in the list, but those of other ranks are shells without weights that return
well-formed zeros nobody reads. The shell in front of the first own layer returns what the previous rank
sent, and the last own layer passes its result on. MLX is lazy: the embedding, norm and head that this
stage does not need are built into the graph and never evaluated, so they cost neither time nor memory.

Rank N-1 has the first layers, rank 0 the last ones, the norm and the head: an open chain that cannot
deadlock, because nothing on the data plane flows back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_map

from lockstep.model.graph import Leaf, Place, Structure, arrays_in, put


class Transport(Protocol):
    """How a stage reaches its two neighbours."""

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """What the previous stage sends next; evaluating it waits for the message."""
        ...

    def send(self, message: mx.array) -> mx.array:
        """`message` again; evaluating it sends it to the next stage."""
        ...


@dataclass(frozen=True)
class Neighbours:
    """The real transport: from rank + 1, to rank - 1."""

    group: mx.distributed.Group

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return mx.distributed.recv(shape, dtype, self.group.rank() + 1, group=self.group)

    def send(self, message: mx.array) -> mx.array:
        return mx.distributed.send(message, self.group.rank() - 1, group=self.group)


class Message:
    """The arrays that cross one boundary, as one array: two messages in a row might arrive swapped."""

    def __init__(self, leaves: tuple[Leaf, ...], dtype: mx.Dtype | None) -> None:
        kinds = {leaf.dtype for leaf in leaves}
        self.leaves = leaves
        self.dtype = dtype or (kinds.pop() if len(kinds) == 1 else mx.float32)

    def pack(self, result: Any) -> mx.array:
        arrays = dict(arrays_in(result))
        parts = [arrays[leaf.place].astype(self.dtype) for leaf in self.leaves]
        return parts[0] if len(parts) == 1 else mx.concatenate([part.reshape(-1) for part in parts])

    def shape(self, rows: int, length: int) -> tuple[int, ...]:
        """The message's shape in a pass over tokens [rows, length]."""
        shapes = [leaf.sizes(rows, length) for leaf in self.leaves]
        return shapes[0] if len(shapes) == 1 else (sum(map(math.prod, shapes)),)

    def unpack(self, message: mx.array, rows: int, length: int) -> dict[Place, mx.array]:
        """The arrays in `message`, by their place in the layer's result."""
        shapes = [leaf.sizes(rows, length) for leaf in self.leaves]
        ends = list(accumulate(map(math.prod, shapes)))
        parts = mx.split(message, ends[:-1]) if len(shapes) > 1 else [message]
        return {
            leaf.place: part.reshape(shape).astype(leaf.dtype)
            for leaf, part, shape in zip(self.leaves, parts, shapes, strict=True)
        }


class Whole:
    """The shard of a model that is not cut into stages."""

    def __init__(self, model: Module, batchable: bool = True) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._model = model
        self.layers = list(model.layers)
        self.make_cache: Callable[[], list[Any]] = lambda: make_prompt_cache(model)
        caches = self.make_cache()
        self.trimmable, mergeable = abilities(caches)
        self.batchable = mergeable and batchable
        self.vocab_size = int(model(mx.zeros((1, 1), mx.int32), cache=caches).shape[-1])

    def forward(self, tokens: mx.array, cache: list[Any], logits: bool = True) -> mx.array:
        """Logits [rows, length, vocab] of `tokens` [rows, length]; the tokens when no logits are wanted."""
        output: mx.array = self._model(tokens, cache=cache)
        return output if logits else tokens


class Stage:
    """The layers [first, last) of `model`, as a Shard. Changes `model`: it can serve this stage only."""

    def __init__(
        self,
        model: Module,
        structure: Structure,
        span: tuple[int, int],
        transport: Transport,
        wire: mx.Dtype | None = None,
        batchable: bool = True,
    ) -> None:
        """`wire` is the dtype of messages where the ranks compute in different ones; `batchable` is False
        where the model is known to fail with more than one row.

        Raises UsageError when this model cannot be cut at the ends of `span`.
        """
        first, last = span
        count = len(structure.results)
        self.vocab_size = structure.vocab_size
        self.trimmable, mergeable = abilities(structure.caches)
        self.batchable = mergeable and batchable
        self._model = model
        self._structure = structure
        self._transport = transport
        self._incoming = Message(structure.boundary(first), wire) if first else None
        self._outgoing = Message(structure.boundary(last), wire) if last < count else None
        self._places = CachePlaces(structure, span)
        self._message: mx.array | None = None
        self._rows = self._length = 1
        self._install(first, last)

    def make_cache(self) -> list[Any]:
        """This stage's caches, then those that only count tokens where the model asks another stage's."""
        return self._places.make()

    def forward(self, tokens: mx.array, cache: list[Any], logits: bool = True) -> mx.array:
        """Logits [rows, length, vocab] on the last stage, elsewhere the hidden state that was sent.

        Without `logits` the last stage returns what it received: the caches need not depend on it.
        """
        self._rows, self._length = tokens.shape
        output: mx.array = self._model(tokens, cache=self._places.spread(cache))
        self._places.count(cache, self._rows, self._length)
        message, self._message = self._message, None
        if self._outgoing is None and logits:
            return output
        assert message is not None
        return message

    def _install(self, first: int, last: int) -> None:
        layers = list(self._model.layers)
        for i, layer in enumerate(layers):
            if i == first - 1:
                replace_layer(self._model, layer, shell(layer, self._receive))
            elif not first <= i < last:
                replace_layer(self._model, layer, shell(layer, partial(self._blank, i)))
        if self._outgoing is not None:
            _after(layers[last - 1], self._send)
        self._first = first

    def _blank(self, layer: int, known: dict[Place, mx.array] | None = None) -> Any:
        result = self._structure.results[layer]
        known = known or {}
        blanks = {
            leaf.place: mx.zeros(leaf.sizes(self._rows, self._length), leaf.dtype)
            for leaf in result.leaves
            if leaf.place not in known
        }
        return put(result.example, blanks | known)

    def _receive(self) -> Any:
        assert self._incoming is not None
        shape = self._incoming.shape(self._rows, self._length)
        self._message = self._transport.receive(shape, self._incoming.dtype)
        arrays = self._incoming.unpack(self._message, self._rows, self._length)
        return self._blank(self._first - 1, arrays)

    def _send(self, result: Any) -> None:
        assert self._outgoing is not None
        self._message = self._transport.send(self._outgoing.pack(result))


class CachePlaces:
    """Where a stage's caches stand in the list that the model expects.

    Code around the layers asks caches for masks and offsets by position. All caches have seen the same
    tokens, so at another stage's position one of the same kind answers alike. Where this stage has none of
    that kind, it keeps one more that is fed one-number keys, only to count.
    """

    def __init__(self, structure: Structure, span: tuple[int, int]) -> None:
        first, last = span
        owned = [layer is None or first <= layer < last for layer in structure.cache_layers]
        self._fresh = [cache for cache, own in zip(structure.caches, owned, strict=True) if own]
        self._counters = len(self._fresh)
        by_kind: dict[Any, int] = {}
        for i, cache in enumerate(self._fresh):
            by_kind.setdefault(_kind(cache), i)
        own_places = iter(range(len(self._fresh)))
        self._places: list[int | Any] = []
        for cache, own in zip(structure.caches, owned, strict=True):
            kind = _kind(cache)
            if not own and kind not in by_kind and any(_counting(cache)):
                by_kind[kind] = len(self._fresh)
                self._fresh.append(cache)
            self._places.append(next(own_places) if own else by_kind.get(kind, cache))

    def make(self) -> list[Any]:
        return [copy.deepcopy(cache) for cache in self._fresh]

    def spread(self, cache: list[Any]) -> list[Any]:
        """The model's list, from this stage's."""
        assert len(cache) == len(self._fresh), (len(cache), len(self._fresh))
        return [cache[p] if isinstance(p, int) else p for p in self._places]

    def count(self, cache: list[Any], rows: int, length: int) -> None:
        for counter in cache[self._counters :]:
            for part in _counting(counter):
                part.update_and_fetch(*[mx.zeros((rows, 1, length, 1))] * 2)


def abilities(caches: Any) -> tuple[bool, bool]:
    """Whether all of these fresh caches can (drop tokens at any length, be merged with others)."""
    from mlx_lm.models.cache import RotatingKVCache

    parts = [part for cache in caches for part in getattr(cache, "caches", (cache,))]
    trimmable = all(c.is_trimmable() and not isinstance(c, RotatingKVCache) for c in parts)
    return trimmable, all(hasattr(c, "merge") for c in parts)


def shell(layer: Module, returns: Callable[[], Any]) -> Module:
    """A stand-in with the plain attributes of `layer` and none of its weights; a call returns `returns()`."""
    stand_in = _without_weights(layer)
    call = lambda self, *args, **kwargs: returns()  # noqa: E731
    _become(stand_in, call)
    return stand_in


def replace_layer(model: Module, old: Module, new: Module) -> None:
    """Put `new` where `old` is in the lists of `model`, wherever the model keeps them."""
    found = 0
    for _, module in model.named_modules():
        for value in module.values():
            if isinstance(value, list):
                for i, item in enumerate(value):
                    if item is old:
                        value[i] = new
                        found += 1
    assert found, f"{type(old).__name__} is in none of the model's lists"


def _after(layer: Module, saw: Callable[[Any], None]) -> None:
    kind = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, *args, **kwargs)
        saw(result)
        return result

    _become(layer, call)


def _become(layer: Module, call: Callable[..., Any]) -> None:
    # Python looks __call__ up in the class: a subclass for this one layer keeps its names and attributes.
    kind = type(layer)
    object.__setattr__(layer, "__class__", type(kind.__name__, (kind,), {"__call__": call}))


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


def _kind(cache: Any) -> Any:
    parts = getattr(cache, "caches", ())
    sizes = [getattr(cache, name, None) for name in ("max_size", "chunk_size", "keep")]
    return type(cache), *sizes, *map(_kind, parts)


def _counting(cache: Any) -> Iterator[Any]:
    parts = getattr(cache, "caches", None)
    if parts is not None:
        for part in parts:
            yield from _counting(part)
    elif hasattr(cache, "update_and_fetch"):
        yield cache
