import pytest

from lockstep.engine.step import Create, Decode, Prefill, Step
from lockstep.runtime.pace import Pace, size_class


def test_a_step_of_unknown_size_gets_six_times_the_shortest_deadline():
    assert Pace(10.0).deadline_s(3) == 60.0


def test_quick_steps_get_the_shortest_deadline():
    pace = Pace(10.0)
    for _ in range(5):
        pace.took(1, 0.05)
    assert pace.deadline_s(1) == 10.0
    assert pace.deadline_s(2) == 60.0


def test_slow_steps_get_twenty_times_their_99th_percentile():
    pace = Pace(10.0)
    for _ in range(100):
        pace.took(1, 2.0)
    assert pace.deadline_s(1) == pytest.approx(40.0)


def test_prefill_and_decode_of_as_many_tokens_are_not_compared():
    decode = Step(0, [], Decode(0, [1] * 8))
    prefill = Step(0, [], Prefill(0, [[1] * 8]))
    assert len({size_class(decode), size_class(prefill), size_class(Step(0, [Create(0, 1)]))}) == 3
