from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_tokenizer
from lockstep.engine.text import Detokenizer, StopStrings, TextStream, decode, load_tokenizer, token_bytes
from lockstep.errors import UsageError


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer.byte_level(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer.byte_fallback(tmp_path_factory.mktemp("byte_fallback")))


def pieces(tokenizer, tokens):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(t) for t in tokens), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=40))
def test_pieces_of_any_byte_level_tokens_join_to_the_text_of_all(byte_level, tokens):
    tokens = [t for t in tokens if t < len(byte_level)]
    assert "".join(pieces(byte_level, tokens)) == decode(byte_level, tokens)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_pieces_of_any_text_join_to_the_text_with_byte_fallback(byte_fallback, text):
    tokens = byte_fallback.encode(text)
    assert "".join(pieces(byte_fallback, tokens)) == decode(byte_fallback, tokens)


@settings(max_examples=300, deadline=None)
@given(st.text("the fox é中🙂\ufffd", max_size=12), st.text("the fox é中🙂", max_size=12))
def test_a_text_goes_on_after_another_as_if_they_were_one(byte_level, byte_fallback, before, after):
    for tokenizer in (byte_level, byte_fallback):
        first, then = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
        detokenizer = Detokenizer(tokenizer, after=first)
        shown = "".join(detokenizer.add(token) for token in then) + detokenizer.finish()
        assert decode(tokenizer, first) + shown == decode(tokenizer, first + then)


def test_half_a_character_is_never_shown(byte_level):
    tokens = byte_level.encode("a🙂", add_special_tokens=False)
    assert len(tokens) > 2, "the character is split over tokens"
    shown = pieces(byte_level, tokens)
    assert "".join(shown) == "a🙂"
    assert all("\ufffd" not in piece for piece in shown)


def test_an_answer_of_broken_bytes_is_shown_while_it_comes(byte_level):
    broken = byte_level.encode("é", add_special_tokens=False)[:1] * 50
    if len(byte_level.encode("é", add_special_tokens=False)) == 1:
        broken = [byte_level.convert_tokens_to_ids("Ã")] * 50
    shown = pieces(byte_level, broken)
    assert "".join(shown) == "\ufffd" * 50
    assert len("".join(shown[:-1])) > 40


def test_special_tokens_are_part_of_the_text(byte_level):
    tokens = byte_level.encode("<|im_start|>the fox", add_special_tokens=False)
    assert "".join(pieces(byte_level, tokens)) == "<|im_start|>the fox"


def test_leading_spaces_stay_where_the_tokenizer_keeps_them(byte_level, byte_fallback):
    assert "".join(pieces(byte_level, byte_level.encode(" the"))) == " the"
    assert "".join(pieces(byte_fallback, byte_fallback.encode("the fox"))) == "the fox"


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_text_is_shown_up_to_the_first_stop_string_however_it_is_cut(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    filter_ = StopStrings(stop)
    shown = "".join(filter_.feed(p) for p in parts)
    found = filter_.found
    shown += filter_.finish()
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    if found is None:
        assert not ends and shown == text
    else:
        assert text.startswith(shown + found)
        assert not any(s in shown for s in stop)


def test_a_stop_string_over_token_borders_is_never_shown(byte_level):
    stream = TextStream(byte_level, ["brown fox j"])
    shown = ""
    for token in byte_level.encode("the quick brown fox jumps over", add_special_tokens=False):
        shown += stream.feed(token)
        assert "the quick ".startswith(shown)
        if stream.stopped:
            break
    assert stream.stopped
    assert shown + stream.finish() == "the quick "


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end(byte_level):
    stream = TextStream(byte_level, ["lazy cat"])
    shown = "".join(stream.feed(t) for t in byte_level.encode("the lazy ca", add_special_tokens=False))
    assert shown == "the "
    assert shown + stream.finish() == "the lazy ca"
    assert not stream.stopped


def test_the_bytes_of_tokens_join_to_the_bytes_of_the_text(byte_level, byte_fallback):
    for text in ["🙂 the fox", "été"]:
        tokens = byte_level.encode(text, add_special_tokens=False)
        assert b"".join(token_bytes(byte_level, t) for t in tokens) == text.encode()
    byte = byte_fallback.convert_tokens_to_ids("<0xE4>")
    assert token_bytes(byte_fallback, byte) == b"\xe4"


def test_the_end_tokens_come_from_the_configuration(byte_level):
    assert byte_level.eos_token_ids == {byte_level.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(
    "content",
    [
        {"model": 7},
        {"model": 7, "added_tokens": []},
        {"model": {"type": "BPE", "vocab": 3}, "added_tokens": []},
    ],
)
def test_a_tokenizer_that_its_library_does_not_understand_is_refused_in_a_line(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"cannot be loaded \(.+\): download or convert it again") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
