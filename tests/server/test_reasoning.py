from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

import tiny_tokenizer
from lockstep.engine.text import load_tokenizer
from lockstep.server.reasoning import Reasoning, reasoning


def split(text, cuts=(), inside=False):
    """What is thought and what is said of an answer that comes in these pieces."""
    one = Reasoning("<think>", "</think>", inside)
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [one.feed(text[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    pieces.append(one.feed("", last=True))
    return tuple("".join(parts) for parts in zip(*pieces, strict=True))


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        (
            "<think>\nLet me <b>see</b>.\n\nYes.\n</think>\n\nIt is 4.\n",
            False,
            ("Let me <b>see</b>.\n\nYes.", "It is 4.\n"),
        ),
        ("\n <think>a</think>b", False, ("a", "b")),
        ("\na </think> b", True, ("a", "b")),
        ("  4 <think>not a thought</think>", False, ("", "  4 <think>not a thought</think>")),
        ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>")),
        ("<think></think>\n", False, ("", "")),
        ("<think>cut off </thi", False, ("cut off </thi", "")),
        (" <thi", False, ("", " <thi")),
        ("", True, ("", "")),
    ],
)
@given(cuts=st.lists(st.integers(0, 100), max_size=12))
def test_thoughts_are_told_apart_however_the_text_is_cut(text, inside, expected, cuts):
    assert split(text, cuts, inside) == expected


def test_what_is_certain_is_not_held_back():
    one = Reasoning("<think>", "</think>", inside=False)
    fed = ["<think>", "a", " b <", "c", "</think>", "d", " e"]
    assert [one.feed(text) for text in fed] == [
        ("", ""), ("a", ""), (" b", ""), (" <c", ""), ("", ""), ("", "d"), ("", " e"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    folder = tiny_tokenizer.byte_level(tmp_path_factory.mktemp("thinking"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("What is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_a_template_may_begin_to_think(thinking, prompt, inside):
    assert reasoning(thinking, thinking.encode(prompt)).inside == inside


def test_models_without_markers_do_not_think_apart(tokenizer):
    assert reasoning(tokenizer, tokenizer.encode("the fox")) is None
