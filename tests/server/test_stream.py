from __future__ import annotations

import pytest

import tiny_tokenizer
from lockstep.engine.request import Finished, Logprobs, PromptLogprobs, Rejected, Request, Sampling, Token
from lockstep.engine.text import decode, load_tokenizer
from lockstep.server.errors import ApiError
from lockstep.server.stream import choices

TEXT = "the quick brown fox jumps over"


def choice(tokenizer, stop=(), echo=False, shown_tokens=None, prompt="the fox"):
    sampling = Sampling(logprobs=0)
    request = Request(id="a", prompt=tokenizer.encode(prompt), max_tokens=99, sampling=sampling)
    return choices(tokenizer, [request], stop, echo, shown_tokens)[0]


def run(choice, tokens, reason="length"):
    pieces = [choice.feed(Token("a", token, Logprobs(-1.0, []))) for token in tokens]
    pieces.append(choice.feed(Finished("a", reason, 2, len(tokens), cached_tokens=1, queue_s=0.5)))
    return [piece for piece in pieces if piece]


def test_the_pieces_make_the_text_and_the_last_has_the_reason(tokenizer):
    one = choice(tokenizer)
    tokens = tokenizer.encode(TEXT)
    pieces = run(one, tokens)
    assert "".join(p.text for p in pieces) == TEXT
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish == "length"
    assert (one.tokens, one.cached_tokens, one.queue_s) == (len(tokens), 1, 0.5)


def test_every_token_is_scored_once_and_in_order(tokenizer):
    tokens = tokenizer.encode(TEXT + " 🙂")
    scores = [score for p in run(choice(tokenizer), tokens) for score in p.scores]
    assert [s.token for s in scores] == tokens
    assert [s.offset for s in scores] == sorted(s.offset for s in scores)


def test_a_stop_string_shows_neither_in_the_text_nor_in_the_scores(tokenizer):
    one = choice(tokenizer, stop=["brown f"])
    pieces = run(one, tokenizer.encode(TEXT))
    assert "".join(p.text for p in pieces) == "the quick "
    assert pieces[-1].finish == "stop"
    shown = [s for p in pieces for s in p.scores]
    assert all(s.offset < len("the quick ") for s in shown)
    assert one.stopped


def test_nothing_comes_after_a_stop_string(tokenizer):
    one = choice(tokenizer, stop=["quick"])
    pieces = run(one, tokenizer.encode(TEXT))
    assert [p.finish for p in pieces].count("stop") == 1
    assert pieces[-1].finish == "stop"
    assert one.cached_tokens == 1, "the engine's last word still counts"


def test_a_stop_string_in_the_bytes_held_back_to_the_end_is_still_found(tokenizer):
    tokens = tokenizer.encode("the 🜲")
    pieces = run(choice(tokenizer, stop=["\ufffd"]), tokens[:-1])
    assert pieces[-1].finish == "stop"
    assert "".join(p.text for p in pieces) == "the "


def test_an_echoed_prompt_is_scored_before_the_answer(tokenizer):
    one = choice(tokenizer, echo=True)
    prompt = one.request.prompt
    piece = one.feed(PromptLogprobs("a", [None, *(Logprobs(-2.0, []) for _ in prompt[1:])]))
    assert piece is not None
    assert piece.text == "the fox"
    assert [s.token for s in piece.scores] == prompt
    assert piece.scores[0].logprobs is None
    rest = run(one, tokenizer.encode(" jumps"))
    assert rest[0].scores[0].offset == len("the fox")


def test_an_echo_alone_shows_no_token(tokenizer):
    one = choice(tokenizer, echo=True, shown_tokens=0)
    pieces = run(one, tokenizer.encode(" jumps")[:1])
    assert [(p.text, p.finish) for p in pieces] == [("", "length")]
    assert one.tokens == 0


def test_an_answer_goes_on_where_its_prompt_ends(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer.byte_fallback(tmp_path))
    prompt, words = tokenizer.encode("the fox"), tokenizer.encode(" the fox")[1:]
    request = Request(id="a", prompt=prompt, max_tokens=99, sampling=Sampling(logprobs=0))
    whole = decode(tokenizer, prompt + words)
    continued, own = (choices(tokenizer, [request], echo=True, continues=c)[0] for c in (True, False))
    pieces = run(continued, words)
    assert continued.echo + "".join(p.text for p in pieces) == whole == "the fox the fox"
    assert pieces[0].scores[0].offset == len("the fox")
    assert "".join(p.text for p in run(own, words)) == "the fox"


@pytest.mark.parametrize(
    ("retry", "status", "code"), [(True, 429, "queue_full"), (False, 400, "context_length_exceeded")]
)
def test_a_rejection_says_whether_to_try_again(tokenizer, retry, status, code):
    with pytest.raises(ApiError, match="no room") as refusal:
        choice(tokenizer).feed(Rejected("a", "no room", retry, code="context_length_exceeded"))
    assert (refusal.value.status, refusal.value.code) == (status, code)
    assert (refusal.value.retry_after_s is not None) == retry
