"""What is said when a model does not fit: the numbers are right, and what is said to help does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import DoesNotFit
from lockstep.model.partition import RankResources, propose
from lockstep.model.shortfall import check_fits, smallest_extra_rank
from model.machines import MB, machines, model


def test_a_model_that_does_not_fit_is_refused_with_what_would_help():
    costs = model([1000 * MB] * 20, kv=10_000, largest=300 * MB)
    ranks = machines(12_500 * MB, 10_300 * MB)
    with pytest.raises(DoesNotFit) as error:
        check_fits(costs, ranks, propose(costs, ranks, "equal", context=8192))
    message = str(error.value)
    assert "rank 1 (mac1) needs 11.02 GB for layers 0-9 and 8192 tokens of context, 0.72 GB more" in message
    assert "--split memory" in message
    assert "one more machine with" in message
    assert "tokens of context (--context)" not in message
    check_fits(costs, ranks, propose(costs, ranks, "memory", context=8192))


def test_the_context_said_to_fit_does_fit_and_one_token_more_does_not():
    costs = model([1000 * MB] * 20, kv=10_000)
    ranks = machines(10_700 * MB, 10_700 * MB)
    with pytest.raises(DoesNotFit) as error:
        check_fits(costs, ranks, propose(costs, ranks, context=8192))
    most = int(str(error.value).split("What would fit: ")[1].split()[0])
    assert propose(costs, ranks, context=most).fits
    assert not propose(costs, ranks, context=most + 1).fits


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 3000))
def test_the_extra_machine_said_to_be_enough_is_enough_and_a_smaller_one_is_not(n, embedding_mb):
    costs = model([1000 * MB] * 12, embedding=embedding_mb * MB, kv=1000)
    ranks = machines(*[1500 * MB] * n)
    extra = smallest_extra_rank(costs, ranks, 8192)
    assert extra is not None
    assert propose(costs, [*ranks, RankResources(extra)], "memory").fits
    assert not propose(costs, [*ranks, RankResources(extra - 10 * MB)], "memory").fits
