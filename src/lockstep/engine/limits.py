"""What the engine may do at once, and which requests that leaves out for ever."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.engine.request import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`lanes`: decodes in flight, one per pipeline stage. `max_rows`: sequences per lane, or in all where
    sequences are not `batchable`. `max_queue`: requests that may wait. `prefill_chunk`: tokens of one
    prefill step, padding included; `prefill_rows`: prompts in it. `kv_tokens`: tokens of KV memory, of
    which prefix caches take up to `prompt_cache_tokens` while no request needs them. `trimmable`: caches can
    be cut back to a shorter prefix. `look_ahead`: a decode of the only lane may go ahead with tokens that
    rank 0 has not read.
    """

    lanes: int
    kv_tokens: int
    max_context: int
    max_rows: int = 32
    max_queue: int = 256
    prefill_chunk: int = 512
    prefill_rows: int = 8
    prompt_cache_tokens: int = 0
    trimmable: bool = True
    batchable: bool = True
    look_ahead: bool = False

    @property
    def capacity(self) -> int:
        """Sequences that can run at once."""
        return self.max_rows * (self.lanes if self.batchable else 1)

    @property
    def most_requests(self) -> int:
        """Requests that can be here at once, running or waiting."""
        return self.capacity + self.max_queue

    def allowed_tokens(self, request: Request) -> int:
        """The request's `max_tokens`, cut to what the context leaves."""
        return max(0, min(request.max_tokens, self.max_context - len(request.prompt)))

    def refusal(self, request: Request) -> str:
        """Why this request can never run; empty if it can."""
        prompt, allowed = len(request.prompt), self.allowed_tokens(request)
        if prompt == 0:
            return "the prompt is empty: it needs at least one token"
        if prompt >= self.max_context:
            return f"the prompt has {prompt} tokens, but the context has room for {self.max_context - 1}"
        if prompt + allowed > self.kv_tokens:
            return (
                f"{prompt} prompt tokens and {allowed} to generate need KV memory for {prompt + allowed} "
                f"tokens, but there is room for {self.kv_tokens}: shorten the prompt or lower max_tokens"
            )
        return ""
