"""The whole of `lockstep serve`: launcher, front process and two ranks with the default model."""

from __future__ import annotations

import json
import signal
import threading
import time

import httpx2
import openai
import pytest

from cluster import Cluster
from command import lockstep, marked_processes
from parrot import parrot
from waiting import wait_until

PROMPT = "The capital of France is"
GREEDY = {"model": "default", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("serve"), "-n", "2", "--parallel", "pipeline") as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


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
        # Not seed 0: it draws, once, from the very border of two tokens, which rounding moves.
        for chunk in client.completions.create(**body, seed=1 + i % 3):
            texts[i] += chunk.choices[0].text

    together = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join(60)
    assert texts[:3] == texts[3:]
    alone = client.completions.create(**(body | {"stream": False}), seed=2).choices[0].text
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
    wait_until(lambda: server.status()["running"] == 0 and server.status()["unfinished"] == 0)


def test_the_status_tells_of_every_rank(server):
    told = server.status()
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
    assert all(rank["weight_bytes"] > 0 and rank["pid"] > 0 for rank in told["ranks"])
    assert told["parallel"] == "pipeline"
    assert told["ready"] is True


def cpu_used(process, within_s):
    before = sum(process.cpu_times()[:2])
    time.sleep(within_s)
    return sum(process.cpu_times()[:2]) - before


def test_an_idle_server_rests(server):
    wait_until(lambda: server.status()["running"] == 0)
    # The spare front process comes a while after the start, and loads what it will need.
    wait_until(lambda: (spare := server.spare_front()) and cpu_used(spare, within_s=1) == 0, timeout_s=60)
    processes = marked_processes(server.mark)
    assert len(processes) >= 3
    before = {p.pid: sum(p.cpu_times()[:2]) for p in processes}
    time.sleep(5)
    used = {p.pid: (sum(p.cpu_times()[:2]) - before[p.pid]) / 5 for p in processes}
    assert max(used.values()) < 0.01, [(p.cmdline(), used[p.pid]) for p in processes]


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_fits_its_schema(client, temperature):
    # Bounds, or a small model at temperature 1 writes the longest names.
    properties = {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "maximum": 10**8},
    }
    schema = {"type": "object", "properties": properties, "required": ["city", "people"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    messages = [{"role": "user", "content": "Name the capital of France and how many people live there."}]
    body = {
        "model": "default",
        "messages": messages,
        "temperature": temperature,
        "seed": 1,
        "max_tokens": 200,
    }
    plain, held = (
        client.chat.completions.create(**body, response_format=form).choices[0]
        for form in ({"type": "text"}, wanted)
    )
    assert not plain.message.content.startswith("{")
    assert held.finish_reason == "stop"
    said = json.loads(held.message.content)
    assert {name: type(value) for name, value in said.items()} == {"city": str, "people": int}


def test_a_model_calls_a_tool(tmp_path):
    call = '\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    parameters["additionalProperties"] = False
    model = parrot(tmp_path / "parrot", ["Wait.", "<tool_call>", call, "</tool_call>"])
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    body = {"model": "parrot", "messages": [{"role": "user", "content": "Rain?"}], "tools": tools}
    with Cluster(tmp_path, "-n", "2", "--model", str(model), "--context", "512") as server:
        url = server.wait_ready().url
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(**body, temperature=0).choices[0]
            with client.chat.completions.stream(**body, temperature=0) as stream:
                streamed = stream.get_final_completion().choices[0]
            required = client.chat.completions.create(**body, tool_choice="required", seed=1).choices[0]
    assert (required.message.content, required.finish_reason) == (None, "tool_calls")
    for answer in (whole, streamed):
        assert (answer.message.content, answer.finish_reason) == ("Wait.", "tool_calls")
        (made,) = answer.message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Paris"})


def test_a_model_thinks_before_it_answers(tmp_path):
    pieces = ["<think>", "\nTwo and", " two?", "\nEasy.", "</think>", "\n\nIt", " is", " four."]
    model = parrot(tmp_path / "parrot", pieces)
    body = {"model": "parrot", "messages": [{"role": "user", "content": "2 + 2?"}], "temperature": 0}
    with Cluster(tmp_path, "-n", "2", "--model", str(model), "--context", "512") as server:
        url = server.wait_ready().url
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(**body)
            streamed = list(client.chat.completions.create(**body, stream=True))
            cut = client.chat.completions.create(**body, max_tokens=2).choices[0]
    message = whole.choices[0].message
    assert (message.reasoning_content, message.content) == ("Two and two?\nEasy.", "It is four.")
    assert whole.usage.completion_tokens_details.reasoning_tokens == 4
    deltas = [chunk.choices[0].delta.model_dump() for chunk in streamed]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == getattr(message, name)
    assert not any(delta.get("reasoning_content") and delta.get("content") for delta in deltas)
    assert (cut.message.reasoning_content, cut.message.content, cut.finish_reason) == (
        "Two and",
        "",
        "length",
    )


def test_sigterm_ends_everything(tmp_path):
    with Cluster(tmp_path, "-n", "1") as server:
        server.wait_ready().process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert not server.left()
