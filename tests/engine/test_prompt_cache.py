"""Which prefixes are kept, found and forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.prompt_cache import MIN_GAIN, MIN_REUSED, Match, PromptCache, common_prefix

TOKENS = st.lists(st.integers(0, 2), max_size=80)
"""Three kinds of token only, so that prefixes are shared often."""


def text(length: int, *tail: int) -> list[int]:
    return [*range(length), *tail]


def filled(*entries: list[int], capacity: int = 10_000, trimmable: bool = True) -> PromptCache:
    cache = PromptCache(capacity, trimmable)
    for tokens in entries:
        cache.add(tokens, capacity)
    return cache


@given(TOKENS, TOKENS)
def test_common_prefix_counts_leading_equal_tokens(a: list[int], b: list[int]):
    shared = common_prefix(a, b)
    assert a[:shared] == b[:shared]
    assert shared in (len(a), len(b)) or a[shared] != b[shared]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 60), TOKENS), max_size=12), st.booleans(), TOKENS)
def test_the_match_is_the_best_of_all_entries(
    made: list[tuple[int, list[int]]], trimmable: bool, tail: list[int]
):
    cache = PromptCache(300, trimmable)
    held: dict[int, list[int]] = {}
    for length, more in made:
        tokens = [0] * length + more
        entry, gone = cache.add(tokens, 10_000)
        if entry is not None:
            held[entry] = tokens
        for old in gone:
            del held[old]
    assert cache.used == sum(map(len, held.values())) <= 300
    prompt = [0] * 40 + tail

    def usable(tokens: list[int]) -> int:
        shared = common_prefix(tokens, prompt)
        return shared if trimmable or shared == len(tokens) else 0

    best = max(map(usable, held.values()), default=0)
    found = cache.match(prompt)
    if best < MIN_REUSED:
        assert found is None
    else:
        assert found is not None and found.tokens == best == usable(held[found.entry])


def test_a_prompt_finds_the_entry_that_shares_most():
    cache = filled(text(40, 100, 101, *range(40)), text(80, 200), text(60, *[7] * 40))
    assert cache.match(text(80, 7)) == Match(1, 80)
    assert cache.match(text(MIN_REUSED - 1, 7)) is None


def test_an_entry_that_cannot_be_cut_serves_only_prompts_that_begin_with_all_of_it():
    cache = filled(text(50), trimmable=False)
    assert cache.match(text(49, 7)) is None
    assert cache.match(text(50, 7)) == Match(0, 50)


def test_an_entry_that_leads_astray_does_not_hide_a_shorter_one_that_serves():
    cache = filled(text(50), text(90, 0), trimmable=False)
    assert cache.match(text(100)) == Match(0, 50)


def test_a_longer_entry_replaces_the_shorter_one_that_it_can_be_cut_to():
    cache = filled(text(50))
    assert cache.add(text(100), 10_000) == (1, [0])
    assert cache.used == 100


def test_where_entries_cannot_be_cut_the_shorter_one_stays():
    cache = filled(text(50), trimmable=False)
    assert cache.add(text(100), 10_000) == (1, [])
    assert cache.match(text(60)) == Match(0, 50)


def test_an_entry_that_adds_little_is_not_kept():
    cache = filled(text(50))
    assert cache.add(text(50 + MIN_GAIN - 1), 10_000) == (None, [])
    assert cache.add(text(MIN_GAIN - 1), 10_000) == (None, [])


def test_the_least_recently_used_entry_goes_first():
    cache = filled([1] * 40, [2] * 40, [3] * 40, capacity=120)
    cache.touch(0)
    assert cache.add([4] * 40, 120) == (3, [1])
    assert cache.shrink(50) == [2, 0]
    assert cache.used == 40


def test_a_prompt_that_comes_again_keeps_its_entry():
    cache = filled([1] * 40, [2] * 40, capacity=80)
    assert cache.add([1] * 40, 80) == (None, [])
    assert cache.add([3] * 40, 80) == (2, [1])


def test_an_entry_without_room_is_not_kept_and_drives_nobody_out():
    cache = filled([1] * 40, capacity=100)
    assert cache.add([2] * 120, 1000) == (None, [])
    assert cache.add([2] * 60, 50) == (None, [])
    assert cache.used == 40


def test_a_prompt_waits_for_an_entry_only_if_it_gains_by_it():
    cache = filled(text(50))
    assert cache.would_serve(text(90, 1), text(90, 2))
    assert not cache.would_serve(text(60, 1), text(60, 2)), "the entry that is there serves nearly as well"
    assert not filled(trimmable=False).would_serve(text(90, 1), text(90, 2))
    assert filled(trimmable=False).would_serve(text(90), text(90, 2))
    assert not filled(capacity=0).would_serve(text(90), text(90, 2))
