"""Tokens and probabilities as the two APIs write them."""

from __future__ import annotations

import pytest

import tiny_tokenizer
from lockstep.engine.request import Logprobs
from lockstep.engine.text import load_tokenizer
from lockstep.server.render import ChatForm, TextForm, spelling
from lockstep.server.stream import Piece, ScoredToken


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer.byte_fallback(tmp_path_factory.mktemp("byte_fallback")))


def logprobs(form, token, own):
    return form.chunk(Piece(0, "x", [ScoredToken(token, 0, own)])).choices[0].logprobs


def test_alternatives_have_the_drawn_token_and_the_likeliest_of_those_that_look_alike(byte_fallback):
    alike = [byte_fallback.convert_tokens_to_ids(name) for name in ("e", "<0x65>")]
    drawn = byte_fallback.convert_tokens_to_ids("o")
    own = Logprobs(-9.0, [(alike[0], -0.5), (alike[1], -3.0)])
    scores = logprobs(TextForm(byte_fallback, "m", scored=True), drawn, own)
    assert scores.top_logprobs == [{"e": -0.5, "o": -9.0}]


def test_part_of_a_character_is_named_by_its_bytes(byte_fallback, tokenizer):
    tokens = [byte_fallback.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in (0xE4, 0xE5)]
    own = Logprobs(-0.1, [(tokens[0], -0.1), (tokens[1], -3.0)])
    scores = logprobs(TextForm(byte_fallback, "m", scored=True), tokens[0], own)
    assert scores.tokens == [r"bytes:\xe4"]
    assert scores.top_logprobs == [{r"bytes:\xe4": -0.1, r"bytes:\xe5": -3.0}]
    assert spelling(tokenizer, tokenizer.encode("🙂")[0]).name.startswith(r"bytes:\xf0")
    chat = logprobs(ChatForm(byte_fallback, "m", scored=True), tokens[0], own).content[0]
    assert (chat.token, chat.bytes, chat.top_logprobs[1].bytes) == ("\ufffd", [0xE4], [0xE5])


def test_a_token_is_decoded_once_however_often_it_comes(tokenizer, monkeypatch):
    decoded = []
    monkeypatch.setattr("lockstep.server.render.decode", lambda _, tokens: decoded.append(tokens) or "x")
    spelling.cache_clear()
    form = TextForm(tokenizer, "m", scored=True)
    for _ in range(3):
        logprobs(form, 5, Logprobs(-1.0, [(5, -1.0), (6, -2.0)]))
    spelling.cache_clear()
    assert decoded == [[5], [6]]
