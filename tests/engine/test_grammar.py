from __future__ import annotations

import gc
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

import tiny_tokenizer
from lockstep.engine.grammar import Grammars, json_grammar, json_rule
from lockstep.engine.request import Request, Sampled, Sampling
from lockstep.engine.sequence import Sequence
from lockstep.engine.text import decode, load_tokenizer

VOCABULARY = 330
END = 1
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2, 30]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
GRAMMAR = json_grammar(SCHEMA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizer.byte_level(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def grammars(folder):
    grammars = Grammars(folder, VOCABULARY)
    grammars.allowed(sequence())  # It reads the tokenizer.
    return grammars


def sequence(grammar=GRAMMAR, generated=()):
    request = Request(
        id="a",
        prompt=[5],
        max_tokens=1000,
        generated=list(generated),
        stop_tokens=[END],
        sampling=Sampling(grammar=grammar),
    )
    return Sequence(request, request.max_tokens)


def finish(grammars, row, rng):
    """Draw any allowed token until the answer ends."""
    while row.position < row.max_tokens:
        _, reason = row.accept(Sampled(int(rng.choice(np.nonzero(grammars.allowed(row))[0]))))
        if reason == "stop":
            return row.generated
    raise AssertionError("it never ended")


@given(seed=st.integers(0, 2**32))
def test_whatever_is_drawn_fits_the_schema(grammars, tokenizer, seed):
    said = json.loads(decode(tokenizer, finish(grammars, sequence(), np.random.default_rng(seed))))
    assert said.keys() == {"city", "days"}
    assert len(said["city"]) <= 5
    assert said["days"] in (1, 2, 30)


def test_an_answer_that_begins_again_goes_on_where_it_was(grammars, tokenizer):
    begun = finish(grammars, sequence(), np.random.default_rng(3))[:7]
    whole = finish(grammars, sequence(generated=begun), np.random.default_rng(4))
    assert whole[:7] == begun
    json.loads(decode(tokenizer, whole))


def test_without_a_grammar_every_token_is_allowed(grammars):
    assert grammars.allowed(sequence(grammar="")) is None


def test_the_mask_has_the_size_of_the_vocabulary(grammars):
    assert grammars.allowed(sequence()).shape == (VOCABULARY,)


def test_what_does_not_fit_can_only_end(grammars):
    (end,) = np.nonzero(grammars.allowed(sequence(generated=[40])))[0]
    assert end == END


def test_an_answer_is_forgotten_with_its_sequence(grammars):
    gc.collect()
    before = len(grammars._followed)
    row = sequence()
    grammars.allowed(row)
    assert len(grammars._followed) == before + 1
    del row
    gc.collect()
    assert len(grammars._followed) == before


def test_a_request_is_refused_where_its_grammar_cannot_be_followed(grammars, folder, tmp_path):
    asked = sequence().request
    assert grammars.refusal(asked) == ""
    assert grammars.refusal(sequence(grammar="").request) == ""
    assert grammars.refusal(sequence(grammar="nonsense").request)
    assert "must not be empty" in grammars.refusal(msgspec.structs.replace(asked, stop_tokens=[]))
    assert "too small" in Grammars(folder, 100).refusal(asked)
    assert "No such file" in Grammars(tmp_path, VOCABULARY).refusal(asked)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    assert "decoder" in Grammars(tmp_path, VOCABULARY).refusal(asked)


def test_an_answer_that_went_astray_is_cut_off(grammars):
    row = sequence(generated=[40])
    grammars.allowed(row)
    assert row.accept(Sampled(END)) == ([], "length")
    assert sequence().accept(Sampled(END)) == ([], "stop")


def test_options_of_the_compiler_are_not_for_clients():
    assert json_grammar(SCHEMA | {"x-guidance": {"lenient": True}}) == GRAMMAR
    assert json_rule("a", {"x-guidance": {"lenient": True}}) == json_rule("a", {})
