from hypothesis import given
from hypothesis import strategies as st

from lockstep.engine.step import Decode, Step
from lockstep.runtime.faults import altered
from lockstep.runtime.ledger import KEPT_MARKS, Ledger, Mark

tokens = st.lists(st.lists(st.integers(0, 50000), min_size=1, max_size=4), min_size=1, max_size=30)


def recorded(steps):
    ledger = Ledger()
    for step in steps:
        ledger.record(step)
    return ledger


@given(tokens, st.data())
def test_ranks_that_execute_the_same_steps_agree_however_far_one_is_behind(rows, data):
    steps = [Step(i, [], Decode(0, row)) for i, row in enumerate(rows)]
    behind = data.draw(st.integers(0, len(steps)))
    assert not recorded(steps).contradicts(recorded(steps[:behind]).mark)
    assert not recorded(steps[:behind]).contradicts(recorded(steps).mark)


@given(tokens, st.data())
def test_one_other_step_is_seen_at_once_and_ever_after(rows, data):
    steps = [Step(i, [], Decode(0, row)) for i, row in enumerate(rows)]
    wrong = data.draw(st.integers(0, len(steps) - 1))
    others = [altered(step) if i == wrong else step for i, step in enumerate(steps)]
    ours = recorded(steps)
    for end in range(len(steps) + 1):
        assert ours.contradicts(recorded(others[:end]).mark) == (end > wrong)


def test_what_lies_too_far_back_contradicts_nothing_and_is_not_kept():
    ledger = recorded(Step(i, []) for i in range(2 * KEPT_MARKS))
    assert not ledger.contradicts(Mark(5, 12345))
    assert ledger.contradicts(Mark(2 * KEPT_MARKS - 1, 12345))


def test_the_last_steps_can_be_told_in_words():
    ledger = recorded(Step(i, [], Decode(0, [i])) for i in range(7))
    assert ledger.last().split("; ")[-1].startswith("6 Decode(batch=0, tokens=[6]")
    assert len(ledger.last().split("; ")) == 5
