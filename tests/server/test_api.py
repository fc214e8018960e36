"""The API as real clients see it: a real front process, a scripted rank 0."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess

import httpx2
import openai
import psutil
import pytest

from front_process import answer_tokens
from lockstep.engine.request import Cancel, Request, Sampling
from lockstep.engine.text import decode
from waiting import wait_until

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"messages": MESSAGES, "seed": 3, "max_tokens": 25}
TEXT = {"prompt": "the fox", "seed": 3, "max_tokens": 25}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(served):
    with httpx2.Client(base_url=served.url, timeout=20) as client:
        yield client


def said(tokenizer, body, seed=3):
    """The text that the scripted rank 0 gives for this completion body."""
    sampling = Sampling(temperature=1.0, seed=seed)
    request = Request(id="a", prompt=tokenizer.encode(body["prompt"]), max_tokens=99, sampling=sampling)
    return decode(tokenizer, answer_tokens(tokenizer, request)[: body["max_tokens"]])


def events(text):
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_a_chat_streams_the_text_it_gives_whole(client):
    whole = client.chat.completions.create(model="tiny", **CHAT)
    stream = list(client.chat.completions.create(model="tiny", stream=True, **CHAT))
    assert whole.object == "chat.completion"
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.role == "assistant"
    assert stream[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert stream[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in stream}) == 1


def test_a_completion_streams_the_text_it_gives_whole(client, tokenizer):
    whole = client.completions.create(model="org/tiny", **TEXT)
    stream = list(client.completions.create(model="default", stream=True, **TEXT))
    assert whole.choices[0].text == said(tokenizer, TEXT)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_usage_is_always_told_and_in_a_stream_when_asked(client):
    usage = client.completions.create(model="tiny", **TEXT).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 25, 27)
    assert usage.prompt_tokens_details.cached_tokens == 3
    options = {"include_usage": True}
    *chunks, last = client.completions.create(model="tiny", stream=True, stream_options=options, **TEXT)
    assert last.usage == usage
    assert last.choices == []
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stop_string_ends_the_text_and_the_work(served, client, tokenizer, monkeypatch):
    full = said(tokenizer, TEXT)
    body = TEXT | {"stop": ["zzz", full[8:14]]}
    monkeypatch.setattr(served.engine, "delay_s", 0.02)
    whole = client.completions.create(model="tiny", **body)
    stream = list(client.completions.create(model="tiny", stream=True, **body))
    assert whole.choices[0].text == full[:8]
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in stream) == full[:8]
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    assert any(isinstance(command, Cancel) for command in served.engine.seen)


def test_the_end_token_ends_the_answer(client):
    answer = client.completions.create(model="tiny", **(TEXT | {"max_tokens": 100}))
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 40


def test_several_choices_and_prompts_each_get_their_own_answer(client, tokenizer):
    body = TEXT | {"prompt": ["the fox", "lazy dog"], "n": 2}
    answer = client.completions.create(model="tiny", **body)
    expected = [said(tokenizer, TEXT | {"prompt": p}, seed) for p in body["prompt"] for seed in (3, 4)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in client.completions.create(model="tiny", stream=True, **body):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_chat_logprobs_have_one_entry_for_each_token(client, tokenizer):
    answer = client.chat.completions.create(model="tiny", logprobs=True, top_logprobs=2, **CHAT)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 25
    said_bytes = b"".join(bytes(e.bytes) for e in entries)
    assert said_bytes.decode("utf-8", "replace") == answer.choices[0].message.content
    assert entries[0].logprob == -0.5
    assert [len(e.top_logprobs) for e in entries] == [2] * 25
    streamed = []
    asked = CHAT | {"logprobs": True, "top_logprobs": 2, "stream": True}
    for chunk in client.chat.completions.create(model="tiny", **asked):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == entries


def test_completion_logprobs_know_where_each_token_starts(client):
    answer = client.completions.create(model="tiny", logprobs=1, echo=True, **TEXT).choices[0]
    scores = answer.logprobs
    assert answer.text.startswith("the fox")
    assert scores.token_logprobs[0] is None
    assert len(scores.tokens) == 2 + 25
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert answer.text[offset:].startswith(token)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_an_echo_alone_is_the_prompt(http, stream, logprobs):
    body = TEXT | {"max_tokens": 0, "echo": True, "stream": stream, "logprobs": logprobs}
    response = http.post("/v1/completions", json=body)
    chunks = events(response.text) if stream else [response.json()]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the fox"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
CALLING = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 400}


def called(choice):
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]


def test_tool_calls_are_told_apart_from_the_text_whole_and_streamed(client):
    whole = client.chat.completions.create(model="tiny", **CALLING).choices[0]
    with client.chat.completions.stream(model="tiny", **CALLING) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        assert (choice.message.content, choice.finish_reason) == ("I shall look.\n", "tool_calls")
        assert called(choice) == [("weather", {"city": "Orléans 🙂", "days": 2}), ("time", {})]
        assert {call.type for call in choice.message.tool_calls} == {"function"}
        assert len({call.id for call in choice.message.tool_calls}) == 2


def test_a_client_that_takes_one_call_at_a_time_gets_one_and_the_work_ends(served, client, monkeypatch):
    monkeypatch.setattr(served.engine, "delay_s", 0.02)
    one = client.chat.completions.create(model="tiny", parallel_tool_calls=False, **CALLING).choices[0]
    assert [name for name, _ in called(one)] == ["weather"]
    assert one.finish_reason == "tool_calls"
    wait_until(lambda: isinstance(served.engine.seen[-1], Cancel) and not served.engine.running)


def test_an_answer_cut_off_in_a_call_keeps_its_text(client):
    cut = client.chat.completions.create(model="tiny", **CALLING | {"max_tokens": 60}).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)
    assert cut.message.content.startswith("I shall look.\n<tool_call>\n{")


def test_a_required_call_reaches_the_engine_as_a_grammar(served, client):
    chosen = {"type": "function", "function": {"name": "time"}}
    client.chat.completions.create(model="tiny", tool_choice=chosen, **CALLING)
    (asked,) = [seen for seen in served.engine.seen if isinstance(seen, Request)][-1:]
    assert "time" in asked.sampling.grammar
    assert "weather" not in asked.sampling.grammar


def test_a_schema_reaches_the_engine_as_a_grammar(served, http):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert http.post("/v1/chat/completions", json=CHAT | {"response_format": wanted}).status_code == 200
    (asked,) = [seen for seen in served.engine.seen if isinstance(seen, Request)][-1:]
    assert '"a"' in asked.sampling.grammar
    schema["properties"] = 3
    refused = http.post("/v1/chat/completions", json=CHAT | {"response_format": wanted})
    assert error_of(refused, 400)["param"] == "response_format"


def test_models_are_listed_and_found_by_any_of_their_names(client):
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    for name in ("org/tiny", "tiny", "default"):
        assert client.models.retrieve(name).id == "org/tiny"


def test_a_wrong_model_is_not_found_and_nothing_is_asked_of_the_engine(served, client):
    seen = len(served.engine.seen)
    for call in (
        lambda: client.chat.completions.create(model="gpt-9", **CHAT),
        lambda: client.completions.create(model="gpt-9", **TEXT),
        lambda: client.models.retrieve("gpt-9"),
    ):
        with pytest.raises(openai.NotFoundError) as refusal:
            call()
        assert refusal.value.code == "model_not_found"
    assert len(served.engine.seen) == seen


def test_health_ready_status_and_metrics_answer(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    status = http.get("/cluster/status").json()
    assert status["ranks"][0]["layers"] == [0, 2]
    assert status["ready"] is True
    metrics = http.get("/metrics").text
    assert 'lockstep_requests_total{route="/ready",status="200"}' in metrics
    assert "lockstep_engine_ready 1.0" in metrics
    assert http.get("/openapi.json").json()["paths"]["/v1/completions"]


def test_every_answer_carries_its_request_id(http):
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/health", headers={"x-request-id": 'a" b'}).headers["x-request-id"] != 'a" b'
    assert len(http.get("/nowhere").headers["x-request-id"]) == 32


def test_the_log_has_one_line_per_request_and_no_text(served, http):
    headers = {"x-request-id": "find-me"}
    http.post("/v1/completions", json=TEXT | {"prompt": "secret words"}, headers=headers)
    lines = [line for line in served.front.stderr.read_text().splitlines() if "find-me" in line]
    assert len(lines) == 1
    for part in ("completion_tokens=25", "ttft_s=", "tpot_s=", "queue_s=0.01", "finish=length"):
        assert part in lines[0]
    assert "secret" not in served.front.stderr.read_text()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": -5}',
        b'{"prompt": "a", "max_tokens": 99999999999999999999999}',
        b'{"prompt": "a", "seed": 99999999999999999999999}',
        b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": [999999]}',
        b'{"prompt": ""}',
        b'{"prompt": []}',
        b'{"prompt": "a", "max_tokens": 5000}',
        b'{"prompt": ' + b"[" * 50_000,
        b'{"prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"prompt": "' + b"the fox " * 3000 + b'"}',
    ],
    ids=lambda body: body[:40].decode("ascii", "replace"),
)
def test_a_bad_completion_body_is_a_4xx_with_a_reason(http, body):
    error_of(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least 1 item"),
        ([{"role": "wizard", "content": "a"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ("a", "messages"),
    ],
)
def test_bad_messages_are_named(http, messages, reason):
    assert reason in error_of(http.post("/v1/chat/completions", json={"messages": messages}), 400)["message"]


def test_more_answers_than_there_can_ever_be_are_refused_for_good(http):
    response = http.post("/v1/completions", json={"prompt": ["the fox"] * 128, "n": 5})
    assert "640 answers and at most 500" in error_of(response, 400)["message"]
    assert "retry-after" not in response.headers


def test_why_a_body_was_refused_is_in_the_log(served, http):
    error_of(http.post("/v1/completions", json={"prompt": 3}, headers={"x-request-id": "bad-body"}), 400)
    lines = [line for line in served.front.stderr.read_text().splitlines() if "bad-body" in line]
    assert 'error="prompt: Input should be a valid string"' in lines[0]


def test_a_refused_field_is_named(http):
    error = error_of(http.post("/v1/chat/completions", json=CHAT | {"functions": [{"name": "f"}]}), 400)
    assert error["param"] == "functions"
    assert error["type"] == "invalid_request_error"


def test_a_huge_body_is_refused_announced_or_not(http):
    error_of(http.post("/v1/completions", json=TEXT | {"prompt": "a" * 300_000}), 413)

    def chunks():
        for _ in range(30):
            yield b"a" * 10_000

    response = http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    error_of(response, 413)


def test_other_paths_and_methods_have_the_same_shape(http):
    assert "/nowhere" in error_of(http.get("/nowhere"), 404)["message"]
    response = http.get("/v1/completions")
    assert "GET" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


def test_no_other_origin_is_let_in_by_default(http):
    response = http.get("/health", headers={"origin": "https://example.org"})
    assert "access-control-allow-origin" not in response.headers


def test_curl_reads_a_stream(served):
    body = json.dumps(TEXT | {"stream": True})
    command = ["curl", "-sSN", "-H", "content-type: application/json", "-d", body]
    output = subprocess.run(
        [*command, served.url + "/v1/completions"], capture_output=True, text=True, timeout=20, check=True
    ).stdout
    assert events(output)[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(served, stream, monkeypatch):
    monkeypatch.setattr(served.engine, "delay_s", 0.2)
    with socket.create_connection(served.url.removeprefix("http://").split(":"), timeout=5) as client:
        body = json.dumps(TEXT | {"stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        client.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        wait_until(lambda: served.engine.running)
        if stream:
            assert client.recv(100)
    wait_until(lambda: isinstance(served.engine.seen[-1], Cancel), timeout_s=2)
    wait_until(lambda: not served.engine.running, timeout_s=1)


def test_256_streams_at_once_are_neither_lost_nor_mixed_up(served, tokenizer):
    words = ["the fox", "lazy dog", "quick brown", "jumps over", "hello"]

    async def one(client, i):
        body = TEXT | {"prompt": words[i % len(words)], "seed": i, "stream": True}
        text = ""
        stream = await client.completions.create(model="tiny", **body)
        async for chunk in stream:
            text += chunk.choices[0].text
        assert text == said(tokenizer, body, seed=i)
        return 1

    async def everyone():
        http = openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_connections=300))
        async with openai.AsyncOpenAI(
            base_url=served.url + "/v1", api_key="none", max_retries=0, http_client=http
        ) as client:
            return sum(await asyncio.gather(*(one(client, i) for i in range(256))))

    front = psutil.Process(served.front.process.pid)
    assert asyncio.run(everyone()) == 256
    before_bytes = front.memory_info().rss
    assert asyncio.run(everyone()) == 256
    wait_until(lambda: not served.engine.running)
    assert httpx2.get(served.url + "/cluster/status").json()["unfinished"] == 0
    assert front.memory_info().rss < before_bytes + 8e6
