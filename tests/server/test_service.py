"""The way of one request through the front, in this process, with an engine of a few lines."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx2
import pytest

import tiny_tokenizer
from lockstep.engine.request import Finished, Logprobs, PromptLogprobs, Request, Token
from lockstep.engine.text import load_tokenizer
from lockstep.engine.wire import EngineInfo
from lockstep.server import app, render, service
from lockstep.server.auth import Keys
from lockstep.server.limits import RateLimit
from lockstep.server.link import FrontLink
from lockstep.server.service import Service
from lockstep.server.settings import ServerSettings
from lockstep.server.stream import Choice

CONTEXT = 4096
JSON = {"content-type": "application/json"}


@pytest.fixture
def ask(link_config):
    """Posts a body to a front whose engine says `words`, and returns the response."""

    def ask(tokenizer, path, body, words=(), headers=None, **settings):
        link = FrontLink(link_config, recovery_timeout_s=9.0)

        def send(frame):
            for request in getattr(frame, "commands", []):
                if isinstance(request, Request):
                    for event in answer(request, words):
                        link._deliver(event)

        link._send = send
        served = Service(ServerSettings(**settings), tokenizer, link, "tiny", CONTEXT, RateLimit(None))

        async def post():
            link._open(b"engine")
            link._ready(EngineInfo(vocab_size=len(tokenizer), max_context=CONTEXT, max_requests=200))
            transport = httpx2.ASGITransport(app.create_app(served, Keys([])))
            async with httpx2.AsyncClient(transport=transport, base_url="http://front") as client:
                return await client.post(path, content=json.dumps(body), headers=headers or JSON)

        return asyncio.run(post())

    return ask


def answer(request, words):
    own = Logprobs(-1.0, [])
    if request.prompt_logprobs:
        yield PromptLogprobs(request.id, [None, *([own] * (len(request.prompt) - 1))])
    yield from (Token(request.id, token, own) for token in words)
    yield Finished(request.id, "length", len(request.prompt), len(words), cached_tokens=0)


def test_a_completion_goes_on_with_its_prompt_and_a_chat_begins_anew(tmp_path, ask):
    tokenizer = load_tokenizer(tiny_tokenizer.byte_fallback(tmp_path, chat_template=tiny_tokenizer.CHATML))
    words = tokenizer.encode("the fox")
    for echo, text in ((False, " the fox"), (True, "the fox the fox")):
        completion = ask(tokenizer, "/v1/completions", {"prompt": "the fox", "echo": echo}, words)
        assert completion.json()["choices"][0]["text"] == text
    body = {"messages": [{"role": "user", "content": "the fox"}]}
    chat = ask(tokenizer, "/v1/chat/completions", body, words)
    assert chat.json()["choices"][0]["message"]["content"] == "the fox"


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_prompts_probabilities_do_not_hold_up_the_event_loop(tokenizer, ask, monkeypatch, stream):
    threads = set()
    spelling, feed = render.spelling, Choice.feed

    def spell(tokenizer, token):
        threads.add(threading.current_thread())
        return spelling(tokenizer, token)

    def fed(choice, event):
        if isinstance(event, PromptLogprobs):
            threads.add(threading.current_thread())
        return feed(choice, event)

    monkeypatch.setattr(render, "spelling", spell)
    monkeypatch.setattr(Choice, "feed", fed)
    body = {"prompt": "the fox " * 500, "echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
    assert ask(tokenizer, "/v1/completions", body).status_code == 200
    assert threads
    assert threading.main_thread() not in threads


def test_what_is_too_much_is_refused_before_anything_is_made_of_it(tokenizer, ask, monkeypatch):
    monkeypatch.setattr(service, "engine_requests", None)
    response = ask(tokenizer, "/v1/completions", {"prompt": [[5]] * 3, "n": 2}, max_requests=5)
    assert response.status_code == 400
    assert "6 answers and at most 5" in response.json()["error"]["message"]


def test_what_a_client_that_has_gone_asked_for_is_not_begun(tokenizer, link_config, monkeypatch):
    tokenized, go_on = [], threading.Event()
    monkeypatch.setattr(app, "text_tokens", lambda *given: tokenized.append(given[1]))
    link = FrontLink(link_config, recovery_timeout_s=9.0)
    served = Service(ServerSettings(), tokenizer, link, "tiny", CONTEXT, RateLimit(None))
    front = app.create_app(served, Keys([]))
    messages = [{"type": "http.request", "body": b'{"prompt": "a"}'}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    told = []

    async def life():
        busy = served.beside.submit(go_on.wait, 60)

        async def receive():
            return messages.pop(0)

        async def send(message):
            told.append(message)

        await asyncio.wait_for(front(scope, receive, send), 30)
        go_on.set()
        assert busy.result(60)
        served.beside.shutdown()

    asyncio.run(life())
    assert told[0]["status"] == service.CLIENT_CLOSED_REQUEST
    assert not tokenized


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain;charset=UTF-8"])
def test_a_body_that_is_not_sent_as_json_is_refused_by_the_header(tokenizer, ask, kind):
    response = ask(tokenizer, "/v1/completions", {"prompt": "a"}, headers={"content-type": kind})
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]
