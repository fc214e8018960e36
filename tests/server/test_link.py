"""Engines and fronts that die and come back, with clients waiting."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx2
import msgspec
import pytest
import zmq

from front_process import ScriptedEngine, answer_tokens, front_process
from lockstep.engine.request import Finished, Forget, Request, Sampling, Token
from lockstep.engine.text import decode
from lockstep.engine.wire import EngineInfo, LinkConfig, Submit
from lockstep.server.inbox import Inbox
from lockstep.server.link import FrontLink
from ranks import free_ports
from waiting import wait_until

BODY = {"prompt": "the fox", "seed": 3, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def link_config():
    """One link for the front that these tests share."""
    return LinkConfig.make(free_ports(1)[0])


@pytest.fixture
def start(link_config, tokenizer):
    """Starts scripted engines, and ends those that still run."""
    engines = []

    def start(run, **options):
        engines.append(ScriptedEngine(link_config, tokenizer, run, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="module")
def front(folder, link_config, tmp_path_factory):
    settings = {"recovery_timeout_s": 4.0, "keepalive_s": 0.3, "max_requests": 3}
    with front_process(folder, link_config, tmp_path_factory.mktemp("link"), **settings) as front:
        front.wait_http("/health", 200)
        yield front


class Client(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url, **fields):
        super().__init__(daemon=True)
        self._url = url
        self._body = BODY | {"stream": True} | fields
        self.lines = []
        self.status = None
        self.start()

    def run(self):
        with httpx2.stream("POST", self._url + "/v1/completions", json=self._body, timeout=30) as answer:
            self.status = answer.status_code
            self.lines += (line for line in answer.iter_lines() if line)

    @property
    def text(self):
        bodies = [json.loads(line[6:]) for line in self.lines if line.startswith("data: {")]
        return "".join(body["choices"][0]["text"] for body in bodies if "choices" in body)


def expected(tokenizer):
    request = Request(
        id="a", prompt=tokenizer.encode("the fox"), max_tokens=40, sampling=Sampling(temperature=1.0, seed=3)
    )
    return decode(tokenizer, answer_tokens(tokenizer, request))


def test_without_an_engine_an_error_ends_the_waiting(front):
    began_s = time.monotonic()
    stream = Client(front.url)
    whole = httpx2.post(front.url + "/v1/completions", json=BODY, timeout=20)
    assert 3 < time.monotonic() - began_s < 8
    assert whole.status_code == 503
    assert int(whole.headers["retry-after"]) >= 1
    assert "not started" in whole.json()["error"]["message"]
    stream.join(10)
    error = json.loads(stream.lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_unavailable"
    assert error["retry_after"] >= 1
    assert stream.lines[:-1] == [": keep-alive"] * len(stream.lines[:-1])
    assert len(stream.lines) > 5


def test_requests_wait_for_the_first_engine_up_to_the_bound(front, start, tokenizer):
    waiting = [Client(front.url) for _ in range(3)]
    wait_until(lambda: httpx2.get(front.url + "/cluster/status").json()["unfinished"] == 3)
    refused = httpx2.post(front.url + "/v1/completions", json=BODY)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    start("run-waited-for")
    for client in waiting:
        client.join(10)
        assert client.text == expected(tokenizer)


@pytest.mark.parametrize("goodbye", [None, "rank 1 (host mini2) stopped answering in step 7"])
def test_a_stream_goes_on_with_the_same_text_on_the_next_engine(front, start, tokenizer, goodbye):
    first = start(f"run-1 {goodbye}", delay_s=0.05)
    front.wait_ready()
    restarts = httpx2.get(front.url + "/cluster/status").json()["restarts"]
    client = Client(front.url)
    wait_until(lambda: len(client.lines) > 5 or any(len(words) < 30 for _, words in first.running.values()))
    first.stop(goodbye)
    front.wait_http("/ready", 503)
    status = httpx2.get(front.url + "/cluster/status").json()
    assert (goodbye or "connection to the engine broke") in status["reason"]
    assert (goodbye or "connection to the engine broke") in httpx2.get(front.url + "/ready").text
    assert httpx2.get(front.url + "/health").status_code == 200
    time.sleep(0.5)
    second = start(f"run-2 {goodbye}")
    client.join(10)
    assert client.text == expected(tokenizer)
    assert client.lines[-1] == "data: [DONE]"
    resubmitted = next(command for command in second.seen if isinstance(command, Request))
    assert resubmitted.generated, "what the client had was not computed anew"
    assert any(line.startswith(":") for line in client.lines), "silence was filled with comments"
    assert httpx2.get(front.url + "/cluster/status").json()["restarts"] == restarts + 1


def test_the_engines_refusal_becomes_a_status(front, start):
    start("run-refusing", refuse="full: 9 requests wait")
    front.wait_ready()
    for stream in (False, True):
        answer = httpx2.post(front.url + "/v1/completions", json=BODY | {"stream": stream})
        assert answer.status_code == 429
        assert "9 requests wait" in answer.json()["error"]["message"]


def test_a_new_front_makes_the_engine_forget_the_old_ones_requests(folder, tmp_path, tokenizer):
    link_config = LinkConfig.make(free_ports(1)[0])
    engine = ScriptedEngine(link_config, tokenizer, "run-1", delay_s=0.1)
    with front_process(folder, link_config, tmp_path) as old:
        old.wait_ready()
        lost = threading.Thread(target=_read_until_broken, args=(old.url,), daemon=True)
        lost.start()
        wait_until(lambda: engine.running)
    lost.join(10)
    seen = len(engine.seen)
    with front_process(folder, link_config, tmp_path) as new:
        new.wait_ready()
        wait_until(lambda: any(isinstance(command, Forget) for command in engine.seen[seen:]))
        assert not engine.running
        engine.delay_s = 0.0
        client = Client(new.url)
        client.join(10)
        assert client.text == expected(tokenizer)
    engine.stop()


def _read_until_broken(url):
    with (
        pytest.raises(httpx2.TransportError),
        httpx2.stream("POST", url + "/v1/completions", json=BODY | {"stream": True}) as answer,
    ):
        for _ in answer.iter_lines():
            pass


def test_what_was_cancelled_does_not_come_back_with_the_next_engine(link_config):
    async def life():
        link, inbox, sent = FrontLink(link_config, recovery_timeout_s=9.0), Inbox(), []
        link._send = sent.append
        info = EngineInfo(vocab_size=10, max_context=100, max_requests=9)
        link._open(b"engine-1")
        link._ready(info)
        link.submit(Request(id="kept", prompt=[1], max_tokens=9), Inbox())
        link.submit(Request(id="gone", prompt=[1, 2], max_tokens=9), inbox)
        link._deliver(Token("gone", 5))
        link.cancel("gone")
        assert link.unfinished == 2, "the engine still has the last word"
        link.tell_away("rank 1 died")
        assert await inbox.take(1) == [Token("gone", 5), Finished("gone", "cancelled", 2, 1, 0)]
        link._open(b"engine-2")
        sent.clear()
        link._ready(info)
        assert [command.id for body in sent for command in body.commands] == ["kept"]

    asyncio.run(life())


def test_the_engine_gets_no_more_than_it_takes_at_once(link_config):
    async def life():
        link, sent = FrontLink(link_config, recovery_timeout_s=9.0), []
        link._send = sent.append

        def handed():
            names = [command.id for body in sent if isinstance(body, Submit) for command in body.commands]
            sent.clear()
            return names

        for name in "abcd":
            link.submit(Request(id=name, prompt=[1], max_tokens=9), Inbox())
        link._open(b"engine-1")
        link._ready(EngineInfo(vocab_size=10, max_context=100, max_requests=3))
        assert handed() == ["a", "b", "c"]
        link._deliver(Finished("b", "stop", 1, 1, 0))
        assert handed() == ["d"]
        link.submit(Request(id="e", prompt=[1], max_tokens=9), Inbox())
        link.submit(Request(id="f", prompt=[1], max_tokens=9), Inbox())
        link.cancel("e")
        assert handed() == []
        link._open(b"engine-2")
        link._ready(EngineInfo(vocab_size=10, max_context=100, max_requests=2))
        assert handed() == ["a", "c"], "a smaller engine takes fewer"
        for name in ("a", "c", "d"):
            link._deliver(Finished(name, "stop", 1, 1, 0))
        assert handed() == ["d", "f"]

    asyncio.run(life())


def test_nobody_without_the_runs_key_is_heard(front, start, link_config, tokenizer):
    stranger = zmq.curve_keypair()
    forged = msgspec.structs.replace(
        link_config, engine_public=stranger[0].decode(), engine_secret=stranger[1].decode()
    )
    intruder = ScriptedEngine(LinkConfig.decode(forged.encode()), tokenizer, "run-x")
    time.sleep(1)
    assert httpx2.get(front.url + "/ready").status_code == 503
    intruder.stop()
    start("run-known")
    front.wait_ready()
