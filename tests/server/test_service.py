"""The way of one request through the front, in this process, with an engine of a few lines."""

from __future__ import annotations

import asyncio
import threading

import httpx2
import pytest

import tiny_tokenizer
from lockstep.engine.request import Finished, Logprobs, PromptLogprobs, Request, Token
from lockstep.engine.text import load_tokenizer
from lockstep.engine.wire import EngineInfo
from lockstep.server import render, service
from lockstep.server.app import create_app
from lockstep.server.auth import Keys
from lockstep.server.limits import RateLimit
from lockstep.server.link import FrontLink
from lockstep.server.service import Service
from lockstep.server.settings import ServerSettings
from lockstep.server.stream import Choice

CONTEXT = 4096


@pytest.fixture
def ask(link_config):
    """Posts a body to a front whose engine says `words`, and returns the response."""

    def ask(tokenizer, path, body, words=(), **settings):
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
            transport = httpx2.ASGITransport(create_app(served, Keys([])))
            async with httpx2.AsyncClient(transport=transport, base_url="http://front") as client:
                return await client.post(path, json=body)

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
