from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from lockstep.server.errors import explain
from lockstep.server.openai import ChatRequest, CompletionRequest

USER = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return ChatRequest.model_validate({"messages": USER, **fields})


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


def called(arguments):
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}


def nested(levels):
    tree = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


def complete(**fields):
    return CompletionRequest.model_validate({"prompt": "hi", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2},
        {"frequency_penalty": 3},
        {"presence_penalty": -3},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"max_completion_tokens": 0},
        {"n": 0},
        {"n": 1000},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"stop": [1]},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": [1]},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"stream_options": {"include_usage": True}},
        {"stream": "yes"},
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": "hi"},
        {"messages": [{"role": "tool", "content": "4"}]},
        {"messages": [{"role": "user", "content": "4", "tool_call_id": "a"}]},
        {"messages": [{"role": "user", "content": "4", "tool_calls": [called("{}")]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"role": "assistant", "tool_calls": [called("[]")]}]},
        {"messages": [{"role": "assistant", "tool_calls": [called("{")]}]},
        {"messages": [{"role": "assistant", "tool_calls": [called("[" * 100_000)]}]},
        {"tools": [{"type": "function", "function": {}}]},
        {"tools": [{"type": "retrieval"}]},
        {"tools": [function(parameters=nested(70))]},
        {"messages": [{"role": "assistant", "tool_calls": [called(json.dumps(nested(70)))]}]},
        {"messages": [{"role": "assistant", "tool_calls": [called('{"a": "\\ud800"}')]}]},
        {"tools": [function(name="")]},
        {"tools": [function(parameters=[])]},
        {"tools": [function(parameters={"a": "\ud800"})]},
        {"tools": [function()] * 129},
        {"tool_choice": "all"},
        {"tool_choice": "required"},
        {"tool_choice": "required", "tools": []},
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [function()]},
        {"tool_choice": "required", "tools": [function()], "ignore_eos": True},
        {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        {"response_format": {"type": "json_object"}, "ignore_eos": True},
        {"response_format": {"type": "text", "schema": {}}},
        {"response_format": {"type": "json_object", "schema": []}},
    ],
)
def test_a_chat_request_out_of_bounds_is_refused(fields):
    with pytest.raises(ValidationError):
        chat(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields):
    with pytest.raises(ValidationError, match=f"{next(iter(fields))} is not supported"):
        chat(**fields)


def test_asking_for_nothing_is_not_refused():
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"], audio=None)
    complete(suffix="", best_of=1)


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": {"type": "integer"}}, {"type": "integer"}),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
            {"type": "integer"},
        ),
    ],
)
def test_a_response_format_has_a_schema_unless_it_is_text(response_format, schema):
    assert chat(response_format=response_format).schema_of_text == schema
    assert complete(response_format=response_format).schema_of_text == schema


def test_unknown_fields_are_ignored():
    assert chat(no_such_field=1, user="me").messages[0].text == "hi"


def test_tools_may_be_called_unless_the_client_says_no():
    tools = [function(parameters={"type": "object"}, strict=False)]
    assert chat(tools=tools).callable_tools == tools
    assert chat(tools=tools, tool_choice="auto").most_calls is None
    assert chat(tools=tools, tool_choice="none").callable_tools == []
    assert chat(tools=tools, parallel_tool_calls=False).most_calls == 1
    assert not chat(tools=[function(strict=True)]).is_constrained
    assert chat(tools=tools, response_format={"type": "json_object"}).is_constrained


def test_a_tool_has_to_be_called_where_the_client_says_so():
    tools = [function(), function(name="g")]
    assert chat(tools=tools).required_tools == []
    assert chat(tools=tools, tool_choice="required").required_tools == tools
    assert chat(tools=[function(strict=True)], tool_choice="required").required_tools == [
        function(strict=True)
    ]
    chosen = chat(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})
    assert (chosen.required_tools, chosen.callable_tools, chosen.most_calls) == (tools[1:], tools, 1)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"


def test_max_completion_tokens_wins_over_max_tokens():
    assert chat(max_tokens=5, max_completion_tokens=3).token_limit == 3
    assert chat(max_tokens=5).token_limit == 5
    assert chat().token_limit is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_comes_in_four_forms(prompt, prompts):
    assert complete(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [[]], [-1], [1, "a"], [[1], "a"], 3, None, [True], ["a"] * 129])
def test_any_other_prompt_is_refused(prompt):
    with pytest.raises(ValidationError):
        complete(prompt=prompt)


def test_a_part_that_is_no_text_is_named():
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(ValidationError, match="parts of type 'image_url' are not supported, only text"):
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}])


def test_no_answer_at_all_is_only_for_an_echo():
    with pytest.raises(ValidationError, match="echo"):
        complete(max_tokens=0)
    assert complete(max_tokens=0, echo=True).max_tokens == 0


def test_choosing_the_best_of_more_is_refused():
    with pytest.raises(ValidationError, match="best_of 3"):
        complete(best_of=3, n=2)


@pytest.mark.parametrize(
    ("kind", "fields", "path"),
    [
        (chat, {"messages": [*USER, {"role": "assistant", "content": None}]}, "messages.1.content"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages.0.content"),
        (chat, {"stop": ""}, "stop"),
        (chat, {"logit_bias": {"a": 1}}, "logit_bias"),
        (chat, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (chat, {"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        (complete, {"prompt": [1, "a"]}, "prompt"),
        (complete, {"prompt": "\ud800"}, "prompt"),
    ],
)
def test_a_mistake_is_told_by_the_names_of_fields_only(kind, fields, path):
    with pytest.raises(ValidationError) as invalid:
        kind(**fields)
    error = explain(invalid.value.errors())
    assert error.param == path
    assert error.message.startswith(f"{path}: ")
    assert " at 0x" not in error.message
    assert "[" not in error.message.replace("'^[0-9]", "")
