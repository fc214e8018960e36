"""Logits to tokens, on rank 0 only. A drawn token depends on the logits, the seed and the position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from lockstep.engine.grammar import Allowed
from lockstep.engine.request import Logprobs, Sampled, Sampling


class Row(Protocol):
    """One row of a decode step: how its next token is drawn."""

    @property
    def sampling(self) -> Sampling: ...

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def generated(self) -> Sequence[int]: ...


class Draw:
    """The tokens drawn in one decode step, not yet evaluated."""

    def __init__(self, tokens: mx.array, scores: Sequence[Score | None] | None = None) -> None:
        """`tokens` [rows] are drawn already; `scores` are of the rows that want them."""
        self._tokens = tokens
        self._scores = scores or [None] * tokens.shape[0]

    @classmethod
    def of(
        cls,
        logits: mx.array,
        rows: Sequence[Row],
        positions: Sequence[int],
        allowed: Sequence[Allowed | None] = (),
    ) -> Draw:
        """Build the graph that draws one token per row from logits [rows, vocabulary].

        `positions` are those of the tokens to be drawn, counted from the first generated one. Where a row has
        `allowed` tokens, one of these is drawn.
        """
        penalised = _penalised(logits, rows, positions)
        limited = [
            penalised[i] if some is None else mx.where(mx.array(some), penalised[i], -mx.inf)
            for i, some in enumerate(allowed or [None] * len(rows))
        ]
        tokens = mx.stack([_draw(limited[i], row.sampling, positions[i]) for i, row in enumerate(rows)])
        scores = [
            None
            if row.sampling.logprobs is None
            else Score(logits[i : i + 1], tokens[i : i + 1], row.sampling.logprobs)
            for i, row in enumerate(rows)
        ]
        return cls(tokens, scores)

    def arrays(self) -> list[mx.array]:
        """What has to be evaluated before `read`."""
        return [self._tokens, *(array for score in self._scores if score for array in score.arrays())]

    def read(self) -> list[Sampled]:
        """One result per row; waits for the device if it has not finished."""
        tokens: list[int] = self._tokens.tolist()  # type: ignore[assignment]
        return [
            Sampled(token, score.read()[0] if score else None)
            for token, score in zip(tokens, self._scores, strict=True)
        ]


class Score:
    """How likely the model found given tokens, not yet evaluated."""

    def __init__(self, logits: mx.array, tokens: mx.array, alternatives: int) -> None:
        """For each position of logits [positions, vocabulary] its token's logprob and the likeliest ones."""
        logits = logits.astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        self._own = (mx.take_along_axis(logits, tokens[:, None], axis=-1) - total)[:, 0]
        self._ids = _likeliest(logits, alternatives)
        self._values = mx.take_along_axis(logits, self._ids, axis=-1) - total

    def arrays(self) -> list[mx.array]:
        """What has to be evaluated before `read`."""
        return [self._own, self._ids, self._values]

    def read(self) -> list[Logprobs]:
        """One per position; waits for the device if it has not finished."""
        own: list[float] = self._own.tolist()  # type: ignore[assignment]
        ids: list[list[int]] = self._ids.tolist()  # type: ignore[assignment]
        values: list[list[float]] = self._values.tolist()  # type: ignore[assignment]
        return [Logprobs(o, list(zip(i, v, strict=True))) for o, i, v in zip(own, ids, values, strict=True)]


def _likeliest(logits: mx.array, count: int) -> mx.array:
    """Ids of the largest logits of each position, the largest first; the others are not put in order."""
    if count == 0:
        return mx.zeros((logits.shape[0], 0), mx.int32)
    ids = mx.argpartition(logits, kth=-count, axis=-1)[:, -count:]
    order = mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1)
    return mx.take_along_axis(ids, order, axis=-1)


def log_softmax(logits: mx.array) -> mx.array:
    """Natural-log probabilities over the last axis, in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _penalised(logits: mx.array, rows: Sequence[Row], positions: Sequence[int]) -> mx.array:
    if not any(row.sampling.changes_logits for row in rows):
        return logits
    return mx.concatenate([_penalise(logits[i : i + 1], row, positions[i]) for i, row in enumerate(rows)])


def _penalise(logits: mx.array, row: Row, position: int) -> mx.array:
    """Repetition looks at prompt and answer; presence and frequency at the answer, as OpenAI's do."""
    s = row.sampling
    generated = row.generated[:position]
    text = [*row.prompt, *generated]
    repetition = None if s.repetition_penalty == 1 else s.repetition_penalty
    whole_text = make_logits_processors(s.logit_bias, repetition, len(text))
    whole_answer = make_logits_processors(
        presence_penalty=s.presence_penalty,
        presence_context_size=len(generated),
        frequency_penalty=s.frequency_penalty,
        frequency_context_size=len(generated),
    )
    for processors, history in ((whole_text, text), (whole_answer, generated)):
        for process in processors:
            logits = process(mx.array(list(history), dtype=mx.int32), logits)
    return logits


def _draw(logits: mx.array, s: Sampling, position: int) -> mx.array:
    if s.is_greedy:
        return mx.argmax(logits, axis=-1)
    logprobs = log_softmax(logits)[None]
    filters = [
        partial(apply_top_p, top_p=s.top_p) if 0 < s.top_p < 1 else None,
        partial(apply_min_p, min_p=s.min_p) if s.min_p > 0 else None,
        partial(apply_top_k, top_k=s.top_k) if 0 < s.top_k < logprobs.shape[-1] else None,
    ]
    for keep in filter(None, filters):
        logprobs = keep(logprobs)
    # Each token by itself against its own noise (Gumbel): where logits differ in their last bits, as with the
    # number of ranks and rows, the same one wins. mx.random.categorical looks a number up in their sums.
    noise = mx.random.gumbel(logprobs.shape, key=_key(s.seed, position))
    return mx.argmax(logprobs / s.temperature + noise, axis=-1)[0]


def _key(seed: int, position: int) -> mx.array:
    """One random key for each position of each seed (Weyl steps with SplitMix64's constants)."""
    return mx.random.key((seed * 0xBF58476D1CE4E5B9 + position * 0x9E3779B97F4A7C15) & (2**64 - 1))
