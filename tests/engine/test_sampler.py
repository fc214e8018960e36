"""Drawing tokens: filters, penalties, seeds and logprobs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.request import Sampled, Sampling
from lockstep.engine.sampler import Draw, Score

LOGITS = [1.0, 3.0, 2.0, -1.0, 2.5]


@dataclass
class Row:
    sampling: Sampling = Sampling()
    prompt: list[int] = field(default_factory=lambda: [0])
    generated: list[int] = field(default_factory=list)
    position: int = 0


def draw(*rows: Row, logits: list[float] = LOGITS) -> list[Sampled]:
    drawing = Draw.of(mx.array([logits] * len(rows)), rows, [row.position for row in rows])
    mx.eval(*drawing.arrays())
    return drawing.read()


def test_temperature_0_takes_the_likeliest_token_whatever_the_filters() -> None:
    assert [s.token for s in draw(Row(), Row(Sampling(top_k=3, top_p=0.5, seed=9)))] == [1, 1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_next_to_no_temperature_is_none(temperature: float) -> None:
    logits = [1.0, *[0.0] * 200, 1.001, *[0.0] * 200]
    drawn = draw(*[Row(Sampling(temperature=temperature, seed=seed)) for seed in range(20)], logits=logits)
    assert {sampled.token for sampled in drawn} == {201}


def test_the_last_bits_of_logits_hardly_ever_change_a_draw() -> None:
    logits = mx.random.normal((1, 20_000), key=mx.random.key(0)) * 3
    noisy = logits + 1e-5 * mx.random.normal(logits.shape, key=mx.random.key(1))
    rows = [Row(Sampling(temperature=1, seed=1), position=p) for p in range(300)]
    drawn = [
        Draw.of(mx.broadcast_to(own, (len(rows), 20_000)), rows, [row.position for row in rows]).read()
        for own in (logits, noisy)
    ]
    assert drawn[0] == drawn[1]


def test_a_draw_depends_on_seed_and_position_and_not_on_its_neighbours() -> None:
    sampling = Sampling(temperature=1.5, seed=3)
    rows = [Row(sampling, position=p) for p in range(40)]
    together = [s.token for s in draw(*rows)]
    assert together == [draw(row)[0].token for row in rows]
    assert len(set(together)) > 2
    other = [draw(Row(Sampling(temperature=1.5, seed=4), position=p))[0].token for p in range(40)]
    assert other != together


def test_only_allowed_tokens_are_drawn_where_a_row_has_some() -> None:
    sampling = Sampling(temperature=2, seed=5)
    rows = [Row(sampling, position=p % 50) for p in range(100)]
    some = np.array([False, False, True, True, False])
    positions = [row.position for row in rows]
    drawing = Draw.of(mx.array([LOGITS] * 100), rows, positions, [some] * 50 + [None] * 50)
    mx.eval(*drawing.arrays())
    tokens = [sampled.token for sampled in drawing.read()]
    assert set(tokens[:50]) == {2, 3}
    assert tokens[50:] == [sampled.token for sampled in draw(*rows[50:])]


def test_draws_follow_the_distribution() -> None:
    count = 4000
    tokens = [
        s.token for s in draw(*[Row(Sampling(temperature=1, seed=1), position=p) for p in range(count)])
    ]
    total = sum(math.exp(x) for x in LOGITS)
    for token, logit in enumerate(LOGITS):
        expected = math.exp(logit) / total
        assert tokens.count(token) / count == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=5, top_k=2), {1, 4}),
        (Sampling(temperature=5, top_p=0.5), {1, 4}),
        (Sampling(temperature=5, min_p=0.5), {1, 4}),
        (Sampling(temperature=5, logit_bias={3: 100.0}), {3}),
        (Sampling(logit_bias={1: -100.0}), {4}),
    ],
    ids=str,
)
def test_filters_and_biases_leave_only_what_they_allow(sampling: Sampling, possible: set[int]) -> None:
    found = {s.token for s in draw(*[Row(sampling, position=p) for p in range(60)])}
    assert found <= possible
    assert found == possible or sampling.temperature == 0


def test_penalties_count_the_answer_and_repetition_the_prompt_too() -> None:
    said = {"prompt": [1], "generated": [4, 4], "position": 2}
    assert draw(Row(Sampling(presence_penalty=1), **said))[0].token == 1
    assert draw(Row(Sampling(frequency_penalty=0.3), prompt=[0], generated=[1], position=1))[0].token == 1
    assert draw(Row(Sampling(frequency_penalty=0.3), prompt=[0], generated=[1, 1], position=2))[0].token == 4
    assert draw(Row(Sampling(repetition_penalty=2.0), **said))[0].token == 2


def test_tokens_drawn_after_this_position_do_not_count() -> None:
    row = Row(Sampling(frequency_penalty=5), generated=[1, 1, 1], position=0)
    assert draw(row)[0].token == 1


def test_logprobs_come_with_the_likeliest_alternatives_in_order() -> None:
    plain, asked = draw(Row(), Row(Sampling(logprobs=2)))
    assert plain.logprobs is None
    assert asked.logprobs is not None
    total = math.log(sum(math.exp(x) for x in LOGITS))
    assert asked.logprobs.token == pytest.approx(3.0 - total, abs=1e-5)
    assert [token for token, _ in asked.logprobs.top] == [1, 4]
    assert asked.logprobs.top[1][1] == pytest.approx(2.5 - total, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 4))
def test_scores_are_log_probabilities(logits: list[float], token: int, alternatives: int) -> None:
    score = Score(mx.array([logits]), mx.array([token]), alternatives).read()[0]
    total = math.log(sum(math.exp(x) for x in logits))
    assert score.token == pytest.approx(logits[token] - total, abs=1e-3)
    assert [v for _, v in score.top] == sorted((v for _, v in score.top), reverse=True)
    assert len(score.top) == alternatives
