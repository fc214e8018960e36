"""Streams are taken apart alike, however they are cut into pieces."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from lockstep.launch import mpi_rank
from lockstep.launch.agent import HELLO
from lockstep.launch.streams import Beats, Greeting, Records, Take
from lockstep.runtime import beats


def feed(take: Take, data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    for first, last in zip(places, places[1:], strict=False):
        take(data[first:last])


cuts = st.lists(st.integers(0, 5000), max_size=5)


@given(cuts)
def test_what_precedes_the_greeting_is_noise_and_what_follows_is_the_ranks(cuts: list[int]) -> None:
    noise: list[str] = []
    taken: list[bytes] = []
    greeting = Greeting(noise, taken.append)
    feed(greeting, b"banner\nmotd\n" + HELLO + b"text\n" + HELLO, cuts)
    assert greeting.came
    assert (noise, b"".join(taken)) == (["banner", "motd"], b"text\n" + HELLO)


def test_without_a_greeting_all_is_noise() -> None:
    noise: list[str] = []
    taken: list[bytes] = []
    greeting = Greeting(noise, taken.append)
    feed(greeting, b"no route\n" + HELLO[:-1], [4])
    assert not greeting.came and not taken
    assert noise[0] == "no route"


@given(cuts)
def test_records_go_to_their_ranks_and_the_rest_is_mpiruns_own(cuts: list[int]) -> None:
    noise: list[str] = []
    taken: list[tuple[int, str, bytes]] = []
    parts = [b"warning\n", *mpi_rank.records(1, "e", b"text\n"), b"no end: ", *mpi_rank.records(0, "x", b"3")]
    damaged = mpi_rank.records(1, "o", b"lost")[0][:-2] + b"\n"
    feed(Records(2, noise, lambda *record: taken.append(record)), b"".join(parts) + damaged, cuts)
    assert noise == ["warning", "no end: "]
    assert taken == [(1, "e", b"text\n"), (0, "x", b"3")]


@given(cuts)
def test_beats_are_heeded_and_everything_else_goes_on(cuts: list[int]) -> None:
    taken: list[bytes] = []
    reader = Beats(taken.append, first_s=0)
    assert reader.due_s <= time.monotonic()
    feed(reader, b"text" + beats.encode(20) + b"\x1e \x1ex\n" + beats.encode(90) + b"more\n", cuts)
    assert b"".join(taken) == b"text\x1e \x1ex\nmore\n"
    assert 80 < reader.due_s - time.monotonic() <= 90


def test_where_no_beat_is_expected_none_is_late() -> None:
    assert Beats(print).due_s == float("inf")
