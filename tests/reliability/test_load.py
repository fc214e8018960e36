"""Many clients at once on real ranks: each gets the text that it gets alone, and nothing is left."""

import os
import random
import threading
import time

import pytest

from cluster import Cluster

SOAK_S = float(os.environ.get("SOAK_S", "60"))
"""Seconds of random load."""
CLIENTS = 256
WORKERS = 12
TOKENS = 24
LONG = " ".join(["over and over again"] * 120)
SLACK_BYTES = 2**14
"""A cache that is left behind has several times as many."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SOAK_S + 300)]


@pytest.fixture(scope="module")
def cluster(checkpoint, tmp_path_factory):
    arguments = ("-n", "2", "--backend", "mpi", "--model", str(checkpoint), "--prompt-cache-tokens", "0")
    arguments += ("--max-queue", str(CLIENTS))
    with Cluster(tmp_path_factory.mktemp("serve"), *arguments) as cluster:
        yield cluster.wait_ready()


def alone(cluster, prompts, tokens):
    """What each prompt is answered when nobody else asks."""
    answers = {}
    for prompt in prompts:
        stream = cluster.stream(prompt, tokens)
        stream.join(60)
        assert stream.text and not stream.error
        answers[prompt] = stream.text
    return answers


def resting(cluster):
    """The memory of each rank's arrays when nothing runs any more, as all ranks have told since."""
    cluster.wait_status(lambda s: s["ready"] and not (s["running"] or s["waiting"] or s["kv_tokens"]))
    time.sleep(6)  # A rank at rest reports every 5 s.
    status = cluster.status()
    assert [rank["phase"] for rank in status["ranks"]] == ["waiting for work"] * 2
    return [rank["active_bytes"] for rank in status["ranks"]]


def test_of_256_streams_at_once_each_has_the_text_that_it_has_alone(cluster):
    prompts = [f"{number} little ducks went out" for number in range(CLIENTS)]
    expected = alone(cluster, prompts, TOKENS)
    before = resting(cluster)
    streams = [cluster.stream(prompt, TOKENS) for prompt in prompts]
    for stream in streams:
        stream.join(120)
    assert [stream.error for stream in streams if stream.error] == []
    assert [stream.prompt for stream in streams if stream.text != expected[stream.prompt]] == []
    after = resting(cluster)
    assert all(now <= was + SLACK_BYTES for now, was in zip(after, before, strict=True)), (before, after)


class Visitor(threading.Thread):
    """Comes again and again: listens to the end, leaves in the middle, or brings a long prompt."""

    def __init__(self, cluster, expected, seed, until_s):
        super().__init__(daemon=True)
        self._cluster, self._expected, self._until_s = cluster, expected, until_s
        self._chance = random.Random(seed)
        self.visits = {"listened": 0, "left": 0, "long": 0}
        self.wrong = []

    def run(self):
        while time.monotonic() < self._until_s:
            time.sleep(self._chance.expovariate(4))
            visit = self._chance.choice(list(self.visits))
            getattr(self, f"_{visit}")()
            self.visits[visit] += 1

    def _listened(self):
        prompt = self._chance.choice([p for p in self._expected if p != LONG])
        self._check(prompt)

    def _long(self):
        self._check(LONG)

    def _check(self, prompt):
        stream = self._cluster.stream(prompt, TOKENS)
        stream.join(90)
        if stream.error or stream.text != self._expected[prompt]:
            self.wrong.append((prompt[:20], stream.error, stream.text))

    def _left(self):
        stream = self._cluster.stream(self._chance.choice(list(self._expected)), 400)
        stream.leave_after = self._chance.randrange(1, 40)
        stream.join(90)
        if stream.error:
            self.wrong.append(("left", stream.error, ""))


def test_random_arrivals_cancels_and_long_prompts_leave_nothing_behind(cluster):
    expected = alone(cluster, [LONG, *(f"{number} green bottles" for number in range(12))], TOKENS)
    before = resting(cluster)
    until_s = time.monotonic() + SOAK_S
    visitors = [Visitor(cluster, expected, seed, until_s) for seed in range(WORKERS)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(SOAK_S + 120)
    visits = {kind: sum(visitor.visits[kind] for visitor in visitors) for kind in visitors[0].visits}
    print(f"{SOAK_S:.0f} s: {visits}")
    assert [wrong for visitor in visitors for wrong in visitor.wrong] == []
    assert all(count > 10 for count in visits.values()), visits
    after = resting(cluster)
    print(f"bytes of arrays per rank before {before}, after {after}")
    assert all(now <= was + SLACK_BYTES for now, was in zip(after, before, strict=True)), (before, after)
    assert cluster.status()["restarts"] == 0
