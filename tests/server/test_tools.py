from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import glm47, json_tools, kimi_k2, mistral, pythonic, qwen3_coder
from tokenizers import AddedToken, Tokenizer

import tiny_tokenizer
from lockstep.engine.grammar import Grammars
from lockstep.engine.request import Request, Sampled, Sampling
from lockstep.engine.sequence import Sequence
from lockstep.engine.text import decode, load_tokenizer
from lockstep.server.tools import Call, ToolCalls, calls_grammar
from tiny_tokenizer import CALLING

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer that spells the markers, and one that has tokens for them."""
    spelled, own = (tiny_tokenizer.byte_level(tmp_path_factory.mktemp("tiny"), CALLING) for _ in range(2))
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<tool_call>", "</tool_call>")])
    tokenizer.save(str(own / "tokenizer.json"))
    return [spelled, own]


INTEGER = {"type": "object", "properties": {"a": {"type": "integer"}}}


def calls_of(module=json_tools, most=None, tools=TOOLS):
    tokenizer = SimpleNamespace(
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        tool_parser=module.parse_tool_call,
    )
    return ToolCalls(tokenizer, tools, most)


def say(tools, text, cuts=()):
    """The text and the calls of an answer that comes in these pieces."""
    shown, calls = "", []
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for first, end in zip(ends, ends[1:], strict=False):
        more, new = tools.feed(text[first:end], last=False)
        shown, calls = shown + more, calls + new
    more, new = tools.feed("", last=True)
    return shown + more, [(call.name, json.loads(call.arguments)) for call in calls + new]


def call(**fields):
    return f"<tool_call>\n{json.dumps(fields)}\n</tool_call>"


WEATHER = call(name="weather", arguments={"city": "Paris"})


@given(cuts=st.lists(st.integers(0, 500), max_size=20))
def test_calls_are_found_however_the_text_is_cut(cuts):
    text = f"So: <b>\n{WEATHER}\n{call(name='time')}"
    assert say(calls_of(), text, cuts) == ("So: <b>\n", [("weather", {"city": "Paris"}), ("time", {})])


@given(cuts=st.lists(st.integers(0, 500), max_size=20))
def test_text_between_and_after_calls_stays(cuts):
    said, calls = say(calls_of(), f"{WEATHER}and{WEATHER} then <tool_ca", cuts)
    assert (said, len(calls)) == ("and then <tool_ca", 2)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not JSON</tool_call>",
        "<tool_call>[1, 2]</tool_call>",
        "<tool_call>3</tool_call>",
        "<tool_call>null</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "argum',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "not JSON"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": null}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"a": "\\ud83d"}}</tool_call>',
        '<tool_call>{"name": "weather", "id": "\\ud83d"}</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "</tool_call>",
        "",
    ],
)
def test_what_cannot_be_read_as_a_call_stays_text(text):
    tools = calls_of()
    assert say(tools, f"a {text} b") == (f"a {text} b", [])
    assert tools.count == 0


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (qwen3_coder, "<tool_call><function=weather><parameter=a>1e999</parameter></function></tool_call>"),
        (pythonic, "<|tool_call_start|>[weather(a=" + "-" * 100_000 + "1)]<|tool_call_end|>"),
    ],
    ids=["infinity", "deep"],
)
def test_no_text_breaks_a_parser(module, text):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": INTEGER}}]
    shown, calls = calls_of(module, tools=tools).feed(text, last=True)
    assert calls or shown == text


def test_a_call_that_is_cut_off_stays_text():
    text = "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>da"
    assert calls_of(glm47).feed(text, last=True, cut=True) == (text, [])
    assert calls_of(json_tools).feed(WEATHER + "<tool_call>{", last=True, cut=True)[0] == "<tool_call>{"


def test_after_the_most_calls_nothing_is_said():
    tools = calls_of(most=1)
    assert say(tools, f"a {WEATHER} b {WEATHER} c") == ("a ", [("weather", {"city": "Paris"})])
    assert tools.full


def test_arguments_that_are_text_already_are_passed_on():
    _, (made,) = calls_of().feed(call(name="weather", arguments='{"a": 1}'), last=True)
    assert isinstance(made, Call)
    assert (made.name, made.arguments) == ("weather", '{"a": 1}')


@given(seed=st.integers(0, 2**32), one=st.booleans(), own_tokens=st.booleans())
def test_text_that_may_only_call_calls_as_the_parameters_say(folders, seed, one, own_tokens):
    folder = folders[own_tokens]
    tokenizer = load_tokenizer(folder)
    parameters = {
        "type": "object",
        "properties": {"days": {"$ref": "#/$defs/days"}},
        "required": ["days"],
        "additionalProperties": False,
        "$defs": {"days": {"enum": [1, 2]}},
    }
    functions = [
        {"name": "weather", "parameters": parameters},
        {"name": 'say "été"', "parameters": {"additionalProperties": False}},
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    grammar = calls_grammar(tokenizer, tools, most=1 if one else None)
    answer, whole = written(folder, tokenizer, grammar, seed)
    text, calls = say(ToolCalls(tokenizer, tools, None), answer)
    assert text == "" or not whole
    assert len(calls) == 1 or not whole or (calls and not one)
    possible = [("weather", {"days": 1}), ("weather", {"days": 2}), ('say "été"', {})]
    assert all(call in possible for call in calls)


def written(folder, tokenizer, grammar, seed):
    """A random text that the grammar allows, and whether it came to its end."""
    request = Request(id="a", prompt=[5], max_tokens=400, stop_tokens=[1], sampling=Sampling(grammar=grammar))
    row, grammars, rng = Sequence(request, 400), Grammars(folder, len(tokenizer)), np.random.default_rng(seed)
    while row.accept(Sampled(int(rng.choice(np.nonzero(grammars.allowed(row))[0]))))[1] == "":
        pass
    return decode(tokenizer, row.generated), row.position < row.max_tokens


def test_text_that_may_call_or_be_json_is_one_of_the_two(folders):
    tokenizer = load_tokenizer(folders[0])
    schema = {"enum": [{"a": 1}]}
    grammar = calls_grammar(tokenizer, TOOLS, 1, schema)
    found = {written(folders[0], tokenizer, grammar, seed)[0].replace(" ", "") for seed in range(40)}
    said = {text for text in found if text.startswith("{")}
    assert {json.dumps(json.loads(text)) for text in said} == {'{"a": 1}'}
    assert found - said
    assert all(text.startswith("<tool_call>") for text in found - said)


def test_a_function_without_parameters_gets_none(folders):
    tokenizer = load_tokenizer(folders[0])
    grammar = calls_grammar(tokenizer, TOOLS[:1], 1)
    _, calls = say(ToolCalls(tokenizer, TOOLS, None), written(folders[0], tokenizer, grammar, 0)[0])
    assert calls == [("weather", {})]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            qwen3_coder,
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        ),
        (glm47, "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"),
        (mistral, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]'),
        (pythonic, '<|tool_call_start|>[weather(city="Paris")]<|tool_call_end|>'),
        (
            kimi_k2,
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
            '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
        ),
    ],
)
def test_each_model_writes_calls_in_its_own_way(kind, text):
    assert say(calls_of(kind), f"Well. {text}", range(0, len(text), 7)) == (
        "Well. ",
        [("weather", {"city": "Paris"})],
    )
