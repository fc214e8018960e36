"""The whole of `lockstep serve`: launcher, front process and two ranks with the default model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid

import httpx2
import openai
import psutil
import pytest

from command import lockstep, marked_processes
from ranks import SOURCE

PROMPT = "The capital of France is"
GREEDY = {"model": "default", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}


class Server:
    """`lockstep serve ARGUMENTS` on a free port."""

    def __init__(self, log, *arguments):
        self.mark = uuid.uuid4().hex
        self._log = log
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OMPI_", "PMI"))}
        environment |= {
            "PYTHONPATH": str(SOURCE),
            "OPENBLAS_NUM_THREADS": "1",
            "LOCKSTEP_TEST_MARK": self.mark,
        }
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep", "serve", "--port", "0", *arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self, timeout_s):
        """The URL in the line that says so."""
        deadline_s = time.monotonic() + timeout_s
        while not (said := re.search(r" at (http://\S+)", self._log.read_text())):
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline_s, self._log.read_text()
            time.sleep(0.1)
        self.url = said[1]
        return self


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve") / "log", "-n", "2", "--parallel", "pipeline")
    try:
        yield server.wait_ready(90)
    finally:
        server.process.terminate()
        server.process.wait(60)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_until(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.05)


def status(server):
    return httpx2.get(server.url + "/cluster/status").json()


def test_stream_whole_and_generate_say_the_same(client):
    whole = client.completions.create(**GREEDY)
    streamed = "".join(c.choices[0].text for c in client.completions.create(stream=True, **GREEDY))
    alone = lockstep("generate", PROMPT, "--raw", "--json", "--max-tokens", "24")
    assert alone.status == 0, alone.stderr
    assert whole.choices[0].text == streamed == json.loads(alone.stdout)["text"]
    assert whole.usage.completion_tokens == 24


def test_a_seed_says_the_same_alone_and_among_others(client):
    body = GREEDY | {"temperature": 1, "max_tokens": 16, "stream": True}
    texts = [""] * 6

    def ask(i):
        for chunk in client.completions.create(**body, seed=i % 3):
            texts[i] += chunk.choices[0].text

    together = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join(60)
    assert texts[:3] == texts[3:]
    alone = client.completions.create(**(body | {"stream": False}), seed=1).choices[0].text
    assert alone == texts[1]
    assert len(set(texts)) == 3


def test_chat_logprobs_are_those_of_the_likeliest_tokens(client):
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Say hello."}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=2,
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token
        assert 0 >= entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_an_echoed_prompt_is_scored(client):
    answer = client.completions.create(**(GREEDY | {"max_tokens": 0}), echo=True, logprobs=1).choices[0]
    assert answer.text == PROMPT
    assert answer.logprobs.token_logprobs[0] is None
    assert all(score < 0 for score in answer.logprobs.token_logprobs[1:])


def test_a_client_that_leaves_frees_its_slot_on_all_ranks(server):
    body = GREEDY | {"max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", server.url + "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data"):
                break
    wait_until(lambda: status(server)["running"] == 0 and status(server)["unfinished"] == 0)


def test_the_status_tells_of_every_rank(server):
    told = status(server)
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
    assert all(rank["weight_bytes"] > 0 and rank["pid"] > 0 for rank in told["ranks"])
    assert told["parallel"] == "pipeline"
    assert told["ready"] is True


def test_an_idle_server_rests(server):
    wait_until(lambda: status(server)["running"] == 0)
    processes = marked_processes(server.mark)
    assert len(processes) >= 3
    before = {p.pid: sum(p.cpu_times()[:2]) for p in processes}
    time.sleep(5)
    used = {p.pid: (sum(p.cpu_times()[:2]) - before[p.pid]) / 5 for p in processes}
    assert max(used.values()) < 0.01, [(p.cmdline(), used[p.pid]) for p in processes]


def test_sigterm_ends_everything(tmp_path):
    server = Server(tmp_path / "log", "-n", "1").wait_ready(90)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    gone, alive = psutil.wait_procs(marked_processes(server.mark), timeout=5)
    assert not alive
