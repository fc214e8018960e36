"""One stage of a model whose layers are spread over ranks, for any mlx-lm model and without its code.

The model keeps all its layers in the list, but those of other ranks are shells without weights that return
well-formed zeros nobody reads. The shell in front of the first own layer returns what the previous rank
sent, and the last own layer passes its result on. MLX is lazy: the embedding, norm and head that this
stage does not need are built into the graph and never evaluated, so they cost neither time nor memory.

Rank N-1 has the first layers, rank 0 the last ones, the norm and the head: an open chain that cannot
deadlock, because nothing on the data plane flows back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import mlx.core as mx
from mlx.nn.layers.base import Module

from lockstep.model.cache_places import CachePlaces
from lockstep.model.graph import Place, arrays_in, put
from lockstep.model.shard import Want
from lockstep.model.shells import after, replace_layers, shell
from lockstep.model.structure import Leaf, Structure
from lockstep.model.whole import abilities, wanted


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
    """The real transport: from rank + 1, to rank - 1.

    A message may have to wait until the next stage has time to take it. In a stream of its own, `sending`, it
    waits alone: meanwhile this stage receives and computes what comes after it.
    """

    group: mx.distributed.Group
    sending: mx.Stream | None = None

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return mx.distributed.recv(shape, dtype, self.group.rank() + 1, group=self.group)

    def send(self, message: mx.array) -> mx.array:
        next_stage = self.group.rank() - 1
        return mx.distributed.send(message, next_stage, group=self.group, stream=self.sending)


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
        self.trimmable, mergeable, self.replaceable = abilities(structure.caches)
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

    def forward(self, tokens: mx.array, cache: list[Any], want: Want = "logits") -> mx.array:
        """What is wanted on the last stage, elsewhere the hidden state that was sent.

        Where `nothing` is wanted the last stage returns what it received: the caches need not depend on it.
        """
        self._rows, self._length = tokens.shape
        output: mx.array = self._model(tokens, cache=self._places.spread(cache))
        self._places.count(cache, self._rows, self._length)
        message, self._message = self._message, None
        assert message is not None
        return message if self._outgoing is not None else wanted(want, output, message)

    def broadcast(self, drawn: mx.array | None, output: mx.array) -> mx.array:
        raise AssertionError("nothing flows back in a pipeline: tokens come with the next step")

    def _install(self, first: int, last: int) -> None:
        layers = list(self._model.layers)
        shells = {
            id(layer): shell(layer, self._receive if i == first - 1 else partial(self._blank, i))
            for i, layer in enumerate(layers)
            if not first <= i < last
        }
        replace_layers(self._model, shells)
        if self._outgoing is not None:
            after(layers[last - 1], self._send)
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
