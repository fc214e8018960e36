"""Partition: every layer exactly once, in pipeline order, and the best cut of all."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import UsageError
from lockstep.model.partition import WORKING_BYTES, RankResources, parse_split, propose
from model.machines import MB, PLENTY, machines, model, models


def every_cut(layers, n):
    """All contiguous cuts, spans by rank."""
    for inner in combinations(range(1, layers), n - 1):
        edges = [0, *inner, layers]
        yield [(edges[n - 1 - rank], edges[n - rank]) for rank in range(n)]


@given(models, st.data())
def test_every_layer_is_computed_exactly_once_and_in_pipeline_order(costs, data):
    n = data.draw(st.integers(1, costs.layers))
    strategy = data.draw(st.sampled_from(["auto", "equal", "memory"]))
    ranks = [RankResources(data.draw(st.integers(1, PLENTY))) for _ in range(n)]
    spans = propose(costs, ranks, strategy, context=100).spans
    assert [layer for span in reversed(spans) for layer in range(*span)] == list(range(costs.layers))
    assert all(first < end for first, end in spans)


@given(models, st.data())
def test_equal_has_the_fastest_slowest_stage_of_all_cuts(costs, data):
    n = data.draw(st.integers(1, costs.layers))
    speeds = [data.draw(st.sampled_from([1.0, 2.0, 3.5])) for _ in range(n)]

    def slowest(spans):
        reads = [sum(costs.layer_bytes[first:end]) for first, end in spans]
        reads[0] += costs.head_bytes
        return max(read / speed for read, speed in zip(reads, speeds, strict=True))

    spans = propose(costs, [RankResources(PLENTY, speed=s) for s in speeds], "equal").spans
    assert slowest(spans) == min(slowest(cut) for cut in every_cut(costs.layers, n))


@settings(max_examples=50)
@given(models, st.data())
def test_memory_fits_whenever_any_cut_fits(costs, data):
    n = data.draw(st.integers(1, costs.layers))
    ranks = [RankResources(WORKING_BYTES + data.draw(st.integers(1, 300))) for _ in range(n)]
    possible = any(
        propose(costs, ranks, split=[b - a for a, b in c]).fits for c in every_cut(costs.layers, n)
    )
    assert propose(costs, ranks, "memory").fits == possible
    assert propose(costs, ranks, "auto").fits == possible


@given(models, st.integers(1, 9))
def test_all_weights_are_held_once_except_a_tied_table_which_both_ends_need(costs, n):
    n = min(n, costs.layers)
    held = sum(share.weight_bytes for share in propose(costs, machines(*[PLENTY] * n)).shares)
    assert held == costs.total_bytes + (costs.embedding_bytes if costs.tied and n > 1 else 0)


def test_the_stage_with_the_head_gets_fewer_layers():
    assert propose(model([10] * 30, head=40, tied=True, embedding=40), machines(PLENTY, PLENTY)).spans == (
        (17, 30),
        (0, 17),
    )


def test_memory_gives_a_machine_of_twice_the_memory_twice_the_layers():
    big, small = WORKING_BYTES + 60_000 * MB, WORKING_BYTES + 30_000 * MB
    assert propose(model([1000 * MB] * 30), machines(big, small), "memory").spans == ((10, 30), (0, 10))


def test_auto_moves_layers_to_the_larger_machine_only_when_equal_does_not_fit():
    costs = model([1000 * MB] * 30)
    assert propose(costs, machines(60_000 * MB, 16_000 * MB)).strategy == "equal"
    crowded = propose(costs, machines(60_000 * MB, 9_000 * MB))
    assert crowded.strategy == "memory"
    assert crowded.spans[1][1] < 9


def test_a_manual_split_is_in_rank_order():
    spans = propose(model([1] * 28), machines(PLENTY, PLENTY, PLENTY), split=[10, 12, 6]).spans
    assert spans == ((18, 28), (6, 18), (0, 6))


def test_a_rank_that_holds_the_weights_in_more_bytes_gets_fewer_layers():
    stored, dequantized = model([1] * 30, kv=1), model([8] * 30, kv=2)
    ranks = [RankResources(PLENTY), RankResources(PLENTY, costs=dequantized)]
    planned = propose(stored, ranks, "equal", context=10)
    assert planned.spans == ((3, 30), (0, 3))
    assert [share.weight_bytes for share in planned.shares] == [27, 24]
    assert [share.kv_bytes for share in planned.shares] == [270, 60]


def test_sliding_windows_bound_the_cache():
    share = propose(model([1, 1], kv=10, window=512), machines(PLENTY), context=8192).shares[0]
    assert share.kv_bytes == 2 * 10 * 512


@pytest.mark.parametrize(
    ("split", "numbers"),
    [([10, 9, 9], ["28", "30"]), ([10, 20], ["2 ranks", "3"]), ([0, 15, 15], ["at least one layer"])],
)
def test_a_split_that_does_not_add_up_is_refused_with_the_numbers(split, numbers):
    with pytest.raises(UsageError) as error:
        propose(model([1] * 30), machines(PLENTY, PLENTY, PLENTY), split=split)
    assert all(number in str(error.value) for number in numbers)


def test_more_ranks_than_layers_is_refused_with_the_numbers():
    with pytest.raises(UsageError, match="2 layers cannot be cut into 3 stages"):
        propose(model([1, 1]), machines(PLENTY, PLENTY, PLENTY))


def test_a_split_at_a_layer_that_no_stage_may_begin_with_is_refused_with_those_that_may():
    with pytest.raises(UsageError, match="over 2 ranks, only before layers: 4, 8"):
        propose(model([1] * 20), machines(PLENTY, PLENTY), split=[15, 5], cuts=[4, 8])


@given(models, st.data())
def test_stages_begin_only_where_the_model_can_be_cut(costs, data):
    cuts = data.draw(st.sets(st.integers(1, costs.layers)))
    n = data.draw(st.integers(1, costs.layers))
    possible = len(cuts - {costs.layers}) >= n - 1
    try:
        spans = propose(costs, machines(*[PLENTY] * n), cuts=cuts).spans
    except UsageError as error:
        assert not possible
        assert "only before layers" in str(error)
    else:
        assert possible
        assert {first for first, _ in spans} <= cuts | {0}


def test_split_text_names_a_strategy_or_counts_layers():
    assert parse_split("memory") == ("memory", None)
    assert parse_split("10,9,9") == ("auto", (10, 9, 9))
    with pytest.raises(UsageError, match="--split ten"):
        parse_split("ten")


def test_planning_a_large_model_on_many_machines_takes_under_a_second():
    costs = model([100 + layer % 7 for layer in range(128)], kv=1)
    assert len(propose(costs, machines(*[PLENTY] * 16)).spans) == 16
