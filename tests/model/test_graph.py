"""What is read from lazy graphs of a few operations."""

from __future__ import annotations

import mlx.core as mx

from lockstep.model.graph import Graph, arrays_in, put


def test_needs_walks_back_to_everything_an_output_was_computed_from():
    a, b, c = (mx.ones(2) for _ in range(3))
    middle = a + b
    graph = Graph({"a": a, "b": b, "c": c, "middle": middle, "out": middle * 2})
    assert graph.needs(["out"]) >= {"a", "b", "middle"}
    assert "c" not in graph.needs(["out"])
    assert graph.needs(["out"], stop=["middle"]).isdisjoint({"a", "b"})


def test_two_calls_of_one_compiled_function_are_two_nodes():
    double = mx.compile(lambda x: mx.sin(x) * 2)
    a, b = mx.ones(2), mx.ones(2)
    graph = Graph({"a": a, "b": b, "from a": double(a), "from b": double(b)})
    assert "b" not in graph.needs(["from a"])
    assert "a" not in graph.needs(["from b"])


def test_there_may_be_thousands_of_names():
    arrays = {f"array {i}": mx.ones(1) for i in range(2500)}
    graph = Graph(arrays | {"out": arrays["array 7"] + arrays["array 2400"]})
    assert graph.needs(["out"]) & arrays.keys() == {"array 7", "array 2400"}


def test_put_replaces_arrays_at_the_places_where_they_were_found():
    tree = (mx.zeros(1), [3, mx.ones(2)], None)
    places = dict(arrays_in(tree))
    assert list(places) == [(0,), (1, 1)]
    assert put(tree, dict.fromkeys(places, "array")) == ("array", [3, "array"], None)
