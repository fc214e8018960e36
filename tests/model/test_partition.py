"""Partition: every layer exactly once, in pipeline order, and the best cut of all."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.errors import UsageError
from lockstep.model.costs import ModelCosts
from lockstep.model.partition import (
    WORKING_BYTES,
    RankResources,
    parse_split,
    plan,
    propose,
    smallest_extra_rank,
)

PLENTY = 10**15
MB = 1_000_000


def model(layer_bytes, head=0, embedding=0, tied=False, kv=0, window=None, largest=0):
    count = len(layer_bytes)
    return ModelCosts(
        layer_bytes=tuple(layer_bytes),
        read_bytes=tuple(layer_bytes),
        embedding_bytes=embedding,
        head_bytes=head,
        tied=tied,
        kv_bytes_per_token=(kv,) * count,
        kv_window=(window,) * count,
        largest_tensor_bytes=largest,
        max_context=131072,
        vocab_size=1000,
    )


def machines(*memory_bytes):
    return [RankResources(m, f"mac{rank}") for rank, m in enumerate(memory_bytes)]


models = st.builds(
    model,
    st.lists(st.integers(0, 50), min_size=1, max_size=9),
    head=st.integers(0, 120),
    embedding=st.integers(0, 120),
    tied=st.booleans(),
    kv=st.integers(0, 5),
)


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

    spans = plan(costs, [RankResources(PLENTY, speed=s) for s in speeds], "equal").spans
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
    held = sum(share.weight_bytes for share in plan(costs, machines(*[PLENTY] * n)).shares)
    assert held == costs.total_bytes + (costs.embedding_bytes if costs.tied and n > 1 else 0)


def test_the_stage_with_the_head_gets_fewer_layers():
    assert plan(model([10] * 30, head=40, tied=True, embedding=40), machines(PLENTY, PLENTY)).spans == (
        (17, 30),
        (0, 17),
    )


def test_memory_gives_a_machine_of_twice_the_memory_twice_the_layers():
    big, small = WORKING_BYTES + 60_000 * MB, WORKING_BYTES + 30_000 * MB
    assert plan(model([1000 * MB] * 30), machines(big, small), "memory").spans == ((10, 30), (0, 10))


def test_auto_moves_layers_to_the_larger_machine_only_when_equal_does_not_fit():
    costs = model([1000 * MB] * 30)
    assert plan(costs, machines(60_000 * MB, 16_000 * MB)).strategy == "equal"
    crowded = plan(costs, machines(60_000 * MB, 9_000 * MB))
    assert crowded.strategy == "memory"
    assert crowded.spans[1][1] < 9


def test_a_manual_split_is_in_rank_order():
    spans = plan(model([1] * 28), machines(PLENTY, PLENTY, PLENTY), split=[10, 12, 6]).spans
    assert spans == ((18, 28), (6, 18), (0, 6))


def test_a_rank_that_holds_the_weights_in_more_bytes_gets_fewer_layers():
    stored, dequantized = model([1] * 30, kv=1), model([8] * 30, kv=2)
    ranks = [RankResources(PLENTY), RankResources(PLENTY, costs=dequantized)]
    planned = plan(stored, ranks, "equal", context=10)
    assert planned.spans == ((3, 30), (0, 3))
    assert [share.weight_bytes for share in planned.shares] == [27, 24]
    assert [share.kv_bytes for share in planned.shares] == [270, 60]


def test_sliding_windows_bound_the_cache():
    share = plan(model([1, 1], kv=10, window=512), machines(PLENTY), context=8192).shares[0]
    assert share.kv_bytes == 2 * 10 * 512


@pytest.mark.parametrize(
    ("split", "numbers"),
    [([10, 9, 9], ["28", "30"]), ([10, 20], ["2 ranks", "3"]), ([0, 15, 15], ["at least one layer"])],
)
def test_a_split_that_does_not_add_up_is_refused_with_the_numbers(split, numbers):
    with pytest.raises(UsageError) as error:
        plan(model([1] * 30), machines(PLENTY, PLENTY, PLENTY), split=split)
    assert all(number in str(error.value) for number in numbers)


def test_more_ranks_than_layers_is_refused_with_the_numbers():
    with pytest.raises(UsageError, match="2 layers cannot be cut into 3 stages"):
        plan(model([1, 1]), machines(PLENTY, PLENTY, PLENTY))


def test_a_split_at_a_layer_that_no_stage_may_begin_with_is_refused_with_those_that_may():
    with pytest.raises(UsageError, match="over 2 ranks, only before layers: 4, 8"):
        plan(model([1] * 20), machines(PLENTY, PLENTY), split=[15, 5], cuts=[4, 8])


def test_a_model_that_does_not_fit_is_refused_with_what_would_help():
    costs = model([1000 * MB] * 20, kv=10_000, largest=300 * MB)
    ranks = machines(12_500 * MB, 10_300 * MB)
    with pytest.raises(UsageError) as error:
        plan(costs, ranks, "equal", context=8192)
    message = str(error.value)
    assert "rank 1 (mac1) needs 11.02 GB for layers 0-9 and 8192 tokens of context, 0.72 GB more" in message
    assert "--split memory" in message
    assert "one more machine with" in message
    assert "tokens of context (--context)" not in message
    assert plan(costs, ranks, "memory", context=8192).fits


def test_the_context_said_to_fit_does_fit_and_one_token_more_does_not():
    costs = model([1000 * MB] * 20, kv=10_000)
    ranks = machines(10_700 * MB, 10_700 * MB)
    with pytest.raises(UsageError) as error:
        plan(costs, ranks, context=8192)
    most = int(str(error.value).split("What would fit: ")[1].split()[0])
    assert plan(costs, ranks, context=most).fits
    assert not propose(costs, ranks, context=most + 1).fits


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


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 3000))
def test_the_extra_machine_said_to_be_enough_is_enough_and_a_smaller_one_is_not(n, embedding_mb):
    costs = model([1000 * MB] * 12, embedding=embedding_mb * MB, kv=1000)
    ranks = machines(*[1500 * MB] * n)
    extra = smallest_extra_rank(costs, ranks, 8192)
    assert extra is not None
    assert propose(costs, [*ranks, RankResources(extra)], "memory").fits
    assert not propose(costs, [*ranks, RankResources(extra - 10 * MB)], "memory").fits


def test_split_text_names_a_strategy_or_counts_layers():
    assert parse_split("memory") == ("memory", None)
    assert parse_split("10,9,9") == ("auto", (10, 9, 9))
    with pytest.raises(UsageError, match="--split ten"):
        parse_split("ten")


def test_planning_a_large_model_on_many_machines_takes_under_a_second():
    costs = model([100 + layer % 7 for layer in range(128)], kv=1)
    assert len(plan(costs, machines(*[PLENTY] * 16)).spans) == 16
