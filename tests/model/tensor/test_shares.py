import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lockstep.errors import UsageError
from lockstep.model.tensor.shares import apportion, columns, heads

weights = st.lists(st.integers(1, 100), min_size=1, max_size=8)


def covers_once(ranges, count):
    assert ranges[0][0] == 0
    assert ranges[-1][1] == count
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    assert all(first < last for first, last in ranges)


@given(st.integers(1, 500), weights)
def test_every_unit_has_one_owner_and_every_rank_has_a_unit(units, weights):
    assume(units >= len(weights))
    covers_once(apportion(units, weights), units)


@given(st.integers(1, 500), weights)
def test_shares_are_proportional_within_one_unit(units, weights):
    due = [units * weight / sum(weights) for weight in weights]
    assume(min(due) >= 1)
    for (first, last), share in zip(apportion(units, weights), due, strict=True):
        assert abs(last - first - share) < 1 + 1e-9


def test_equal_ranks_differ_by_one_unit_at_most():
    sizes = [last - first for first, last in apportion(3, (1, 1))]
    assert sizes == [2, 1]


def test_a_rank_of_little_weight_still_gets_one_unit():
    assert apportion(4, (1000, 1)) == ((0, 3), (3, 4))


def test_more_ranks_than_units_are_refused_with_both_numbers():
    with pytest.raises(UsageError, match="2 units cannot be cut for 3 ranks"):
        apportion(2, (1, 1, 1))


def test_a_rank_without_weight_is_refused():
    with pytest.raises(UsageError, match="above 0"):
        apportion(4, (1, 0))


@given(st.integers(1, 200), st.sampled_from([1, 16, 32, 64]), weights)
def test_column_cuts_fall_between_quantization_groups(pieces, group, weights):
    assume(pieces >= len(weights))
    ranges = columns(pieces * group, weights, group)
    covers_once(ranges, pieces * group)
    assert all(first % group == 0 for first, _ in ranges)


def test_columns_that_would_split_a_quantization_group_are_refused_with_a_remedy():
    with pytest.raises(UsageError, match="2 pieces, too few for 3 ranks: use at most 2 tensor ranks"):
        columns(128, (1, 1, 1), group=64)
    with pytest.raises(UsageError, match="no multiple of the quantization group"):
        columns(100, (1, 1), group=64)


@given(st.integers(1, 64), st.integers(1, 16), st.sampled_from([32, 64, 80, 128]), weights)
def test_every_query_head_stays_with_its_key_and_value_head(kv_heads, per_kv, width, weights):
    assume(kv_heads >= len(weights))
    shares = heads(kv_heads, per_kv, weights, width)
    covers_once([share.kv for share in shares], kv_heads)
    assert all(share.query == (share.kv[0] * per_kv, share.kv[1] * per_kv) for share in shares)


@given(
    st.integers(1, 32),
    st.integers(1, 8),
    st.sampled_from([16, 32, 64, 96]),
    st.sampled_from([32, 64, 128]),
    weights,
)
def test_head_cuts_fall_between_quantization_groups_or_are_refused(kv_heads, per_kv, width, group, weights):
    assume(kv_heads >= len(weights))
    try:
        shares = heads(kv_heads, per_kv, weights, width, group)
    except UsageError as error:
        unit = group // math.gcd(per_kv * width, group)
        assert kv_heads % unit or kv_heads // unit < len(weights)
        assert "--parallel pipeline" in str(error)
        return
    covers_once([share.kv for share in shares], kv_heads)
    assert all(share.query[0] * width % group == 0 for share in shares)


def test_nine_heads_in_three_groups_become_six_and_three():
    shares = heads(3, 3, (1, 1), 64)
    assert [share.query for share in shares] == [(0, 6), (6, 9)]


def test_ranks_beyond_the_key_value_heads_share_one_and_cut_its_query_heads():
    shares = heads(2, 8, (1, 1, 3, 1))
    assert [share.kv for share in shares] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [share.query for share in shares] == [(0, 4), (4, 8), (8, 14), (14, 16)]


def test_ranks_that_cannot_share_heads_evenly_are_refused_with_the_numbers():
    with pytest.raises(
        UsageError, match="2 key/value heads with 8 query heads each cannot be cut for 3 ranks"
    ):
        heads(2, 8, (1, 1, 1))
