from __future__ import annotations

import random
import statistics
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.bench.client import Endpoint
from lockstep.bench.load import WORDS, Lengths, asks, closed_loop, open_loop, percentiles
from lockstep.errors import UsageError

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(numbers)
def test_percentiles_lie_between_the_least_and_the_most_and_grow(values):
    found = percentiles(values, [0, 25, 50, 95, 100])
    assert found[0] == min(values)
    assert found[-1] == max(values)
    assert found == sorted(found)
    assert found[2] == pytest.approx(statistics.median(values), abs=1e-6)


def test_there_is_no_percentile_of_nothing():
    assert all(value != value for value in percentiles([], [50]))


@given(st.integers(1, 500), st.integers(0, 500), st.integers())
def test_lengths_stay_within_their_bounds(low, more, seed):
    assert low <= Lengths(low, low + more).draw(random.Random(seed)) <= low + more


def test_lengths_are_read_as_people_write_them():
    assert Lengths.parse("64") == Lengths(64, 64)
    assert Lengths.parse("16-256") == Lengths(16, 256)


@pytest.mark.parametrize("text", ["", "0", "a", "9-3", "-5", "5-", "1-2-3", "²", "9" * 30])
def test_other_lengths_are_refused(text):
    with pytest.raises(UsageError, match="number of tokens"):
        Lengths.parse(text)


def test_the_same_seed_asks_the_same():
    again = [asks(5, Lengths(3, 9), Lengths(2, 4), seed=1) for _ in range(2)]
    assert again[0] == again[1] != asks(5, Lengths(3, 9), Lengths(2, 4), seed=2)
    for ask in again[0]:
        assert ask.prompt.startswith(" ")
        assert 3 <= len(ask.prompt.split()) <= 9
        assert set(ask.prompt.split()) <= set(WORDS)


@contextmanager
def counting_server():
    """Answers every request with one token, and notes how many were there at once."""
    there = {"now": 0, "most": 0, "all": 0}
    lock = threading.Lock()
    gate = threading.Barrier(4)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            with lock:
                there["now"] += 1
                there["all"] += 1
                there["most"] = max(there["most"], there["now"])
            self.rfile.read(int(self.headers["content-length"]))
            gate.wait(10)  # The requests of all four clients have to be here before any is answered.
            with lock:
                there["now"] -= 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\ndata: [DONE]\n\n')

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", there
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_closed_loop_keeps_all_its_clients_busy():
    with counting_server() as (url, there):
        run = closed_loop(Endpoint(url), asks(12, Lengths(2, 4), Lengths(1, 1), seed=0), clients=4)
    assert not run.errors
    assert (there["all"], there["most"]) == (12, 4)
    assert run.tokens_per_s == pytest.approx(12 / run.wall_s)


def test_an_open_loop_does_not_wait_for_answers():
    with counting_server() as (url, there):
        run = open_loop(Endpoint(url), asks(4, Lengths(2, 4), Lengths(1, 1), seed=0), per_s=50)
    assert not run.errors
    assert there["most"] == 4
