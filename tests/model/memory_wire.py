"""Stages of a pipeline inside one process: what one sends waits in a list for the next."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx


@dataclass
class Wire:
    """Messages on their way from one stage to the next."""

    messages: list[mx.array] = field(default_factory=list)

    def to(self, onward: Wire) -> Ends:
        """The transport of the stage between this wire and the next one."""
        return Ends(self, onward)


@dataclass
class Ends:
    incoming: Wire
    outgoing: Wire

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        message = self.incoming.messages.pop(0)
        assert (message.shape, message.dtype) == (shape, dtype), (message.shape, shape, message.dtype, dtype)
        return message

    def send(self, message: mx.array) -> mx.array:
        self.outgoing.messages.append(message)
        return message
