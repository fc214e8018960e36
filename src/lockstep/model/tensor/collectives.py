"""Where ranks meet: sums of partial outputs, norms over what is cut, and the vocabulary.

A module keeps its name, its parameters and its class's code; it gets a subclass of that class which
communicates before or after. So every `isinstance` and every path into the model stays true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lockstep.model.classes import become
from lockstep.model.tensor.shares import Range


def most_exchanged(backend: str, ranks: int) -> int:
    """Up to how many bytes a rank may receive for a sum for which all send their whole parts to all others.

    mlx's ring passes parts around twice to sum and once to gather: with computation in between, 33 sums of
    24 KB on 2 ranks take 330 us each, and 195 us like this. Two ranks receive the same in both cases, more of
    them receive less from mlx's ring, which counts for large parts.
    """
    if backend != "ring":
        return 0
    return 4 << 20 if ranks == 2 else 512 << 10


@dataclass
class Meeting:
    """How the ranks' partial results come together.

    `wire` is their dtype where ranks compute in several. A sum for which a rank receives no more than
    `exchanged_bytes` is made of everybody's parts on every rank, in the order of ranks. While `argmax` is
    set, of all logits only the largest is exchanged: `take_largest` has its place.
    """

    group: mx.distributed.Group
    wire: mx.Dtype | None = None
    exchanged_bytes: int = 0
    argmax: bool = False
    _largest: mx.array | None = None

    @property
    def native(self) -> mx.distributed.Group | None:
        """The group for modules that sum by themselves."""
        return self.group

    def sum(self, partial: mx.array) -> mx.array:
        """The sum of everybody's."""
        part = partial if self.wire is None else partial.astype(self.wire)
        if (self.group.size() - 1) * part.nbytes > self.exchanged_bytes:
            total = self._all_sum(part)
        else:
            total = self._all_gather(part).sum(axis=0)
        return total.astype(partial.dtype)

    def logits(self, part: mx.array, ranges: Sequence[Range]) -> mx.array:
        """Everybody's logits; if only the `argmax` matters, zeros of their shape, for nobody to evaluate."""
        if not self.argmax:
            return self.gather(part, ranges)
        first = ranges[self.group.rank()][0]
        place = mx.argmax(part, axis=-1, keepdims=True)
        value = mx.take_along_axis(part, place, axis=-1)
        # float32 holds every place of a vocabulary of up to 16 million exactly.
        own = mx.concatenate([value.astype(mx.float32), (place + first).astype(mx.float32)], axis=-1)
        everybody = self._all_gather(own)
        winner = mx.argmax(everybody[..., :1], axis=0, keepdims=True)
        self._largest = mx.take_along_axis(everybody[..., 1:], winner, axis=0)[0, ..., 0].astype(mx.uint32)
        return mx.zeros((*part.shape[:-1], ranges[-1][1]), part.dtype)

    def take_largest(self) -> mx.array | None:
        """Where the last pass's largest logits are, [rows, length]; None if ranks did not meet for them."""
        largest, self._largest = self._largest, None
        return largest

    def broadcast(self, tokens: mx.array | None, output: mx.array) -> mx.array:
        """The `tokens` [rows, 1] that rank 0 has made of `output` [rows, ...]; the other ranks give None."""
        own = mx.zeros((output.shape[0], 1), mx.int32) if tokens is None else tokens.astype(mx.int32)
        # All ranks must have met for `output` before they meet again.
        return self._all_gather(mx.depends(own, output))[0]

    def gather(self, part: mx.array, ranges: Sequence[Range]) -> mx.array:
        """Everybody's slices of the last axis, whose sizes may differ, next to each other."""
        sizes = [last - first for first, last in ranges]
        widest = max(sizes)
        sent = part if self.wire is None else part.astype(self.wire)
        if part.shape[-1] < widest:
            sent = mx.pad(sent, [(0, 0)] * (part.ndim - 1) + [(0, widest - part.shape[-1])])
        parts = self._all_gather(sent).astype(part.dtype)
        return mx.concatenate([parts[rank, ..., :size] for rank, size in enumerate(sizes)], axis=-1)

    def _all_sum(self, part: mx.array) -> mx.array:
        return mx.distributed.all_sum(part, group=self.group)

    def _all_gather(self, part: mx.array) -> mx.array:
        """[ranks, *part.shape]"""
        return mx.distributed.all_gather(part[None], group=self.group)


class Rehearsal(Meeting):
    """A meeting of one rank alone, which cannot wait for others: the shapes are right, the values are not."""

    @property
    def native(self) -> None:
        return None

    def _all_sum(self, part: mx.array) -> mx.array:
        return part

    def _all_gather(self, part: mx.array) -> mx.array:
        return mx.repeat(part[None], self.group.size(), axis=0)


def reduce_together(modules: Sequence[nn.Module], meeting: Meeting) -> None:
    """Sum the outputs of modules that the model's code adds up with one all_reduce for all of them.

    Each is called once per forward pass. All but the last to be called return zero, and the last returns
    the sum of all; so their sum is right, and nothing but a sum may see them.
    """
    if len(modules) == 1:
        _override(modules[0], __call__=meeting.sum)
        return
    partial: list[mx.array] = []

    def collect(output: mx.array) -> mx.array:
        partial.append(output)
        if len(partial) < len(modules):
            return mx.zeros((), output.dtype)
        total = sum(partial[1:], start=partial[0])
        partial.clear()
        return meeting.sum(total)

    for module in modules:
        _override(module, __call__=collect)


def span_norm(module: nn.RMSNorm, size: int, meeting: Meeting) -> None:
    """Normalise over `size` entries of which each rank has some: one all_reduce of a number per token."""

    def call(self: nn.RMSNorm, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        squares = meeting.sum(mx.sum(wide * wide, axis=-1, keepdims=True))
        normal: mx.array = wide * mx.rsqrt(squares / size + self.eps)
        return normal.astype(x.dtype) * self.weight  # type: ignore[no-any-return]

    become(module, __call__=call)


def split_embedding(module: nn.Module, ranges: Sequence[Range], meeting: Meeting) -> None:
    """Look up on the rank that has the row, and sum; as a head, gather everybody's logits."""
    first, last = ranges[meeting.group.rank()]
    ids = mx.arange(ranges[-1][1])
    mine = (ids >= first) & (ids < last)
    places, owned = mx.where(mine, ids - first, 0), mine[:, None]
    mx.eval(places, owned)
    look_up = type(module).__call__

    def call(self: nn.Module, ids: mx.array) -> mx.array:
        return meeting.sum(mx.where(owned[ids], look_up(self, places[ids]), 0))

    _override(module, as_linear=lambda part: meeting.logits(part, ranges))
    become(module, __call__=call)


def split_head(module: nn.Module, ranges: Sequence[Range], meeting: Meeting) -> None:
    """Compute this rank's slice of the logits and gather everybody's."""
    _override(module, __call__=lambda part: meeting.logits(part, ranges))


def _override(module: nn.Module, **finish: Callable[[mx.array], mx.array]) -> None:
    """Pass what these methods of `module` return through `finish`."""

    def finished(method: Callable[..., mx.array], then: Callable[[mx.array], mx.array]) -> Any:
        return lambda self, *args, **kwargs: then(method(self, *args, **kwargs))

    become(module, **{n: finished(getattr(type(module), n), then) for n, then in finish.items()})
