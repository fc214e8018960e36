"""What a cache is made of, however deep, and what that means for what all of them can do."""

from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from lockstep.model.cache_parts import leaves, nodes
from lockstep.model.whole import abilities


def test_a_cache_that_is_made_of_none_is_its_own_only_leaf():
    cache = KVCache()
    assert list(nodes(cache)) == list(leaves(cache)) == [cache]


def test_leaves_are_found_at_any_depth_in_their_order():
    first, second, third = KVCache(), ArraysCache(2), KVCache()
    inner = CacheList(second, third)
    outer = CacheList(first, inner)
    assert list(leaves(outer)) == [first, second, third]
    assert list(nodes(outer)) == [outer, first, inner, second, third]


def test_a_window_deep_in_a_cache_cannot_drop_tokens_at_any_length():
    assert abilities([CacheList(KVCache(), CacheList(KVCache()))])[0]
    assert not abilities([CacheList(KVCache(), CacheList(RotatingKVCache(max_size=8)))])[0]
