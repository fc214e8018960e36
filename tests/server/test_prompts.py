from __future__ import annotations

import inspect

import pytest
from mlx_lm.tool_parsers import glm47, qwen3_coder
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

import tiny_tokenizer
from lockstep.engine.text import decode, load_tokenizer
from lockstep.server.errors import ApiError
from lockstep.server.openai import ChatRequest, CompletionRequest
from lockstep.server.prompts import Room, chat_tokens, engine_requests, grammar, text_tokens

ROOM = Room(vocab_size=100, max_context=50, max_prompt_tokens=40, default_max_tokens=30)
ROOMY = Room(vocab_size=1000, max_context=10_000, max_prompt_tokens=10_000, default_max_tokens=30)


def chat(**fields):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})


def complete(**fields):
    return CompletionRequest.model_validate({"prompt": "hi", **fields})


def prompted(tokenizer, **fields):
    return chat_tokens(tokenizer, chat(**fields), ROOMY)


def one(body, prompt=(1, 2, 3)):
    return engine_requests(body, list(prompt), ROOM, [7])[0]


def names(function):
    """The named parameters of `function`."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD}


def test_the_chat_template_writes_the_prompt(tokenizer):
    tokens = prompted(tokenizer, messages=[{"role": "developer", "content": "be kind"}])
    assert decode(tokenizer, tokens) == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", [tiny_tokenizer.byte_level, tiny_tokenizer.byte_fallback])
def test_a_chat_has_the_tokens_that_the_tokenizer_gives_it(tmp_path, kind):
    tokenizer = load_tokenizer(kind(tmp_path, chat_template=tiny_tokenizer.CHATML))
    for content in ("the fox", " é 🙂\n", "<|im_end|>the <|im_start|>"):
        messages = [{"role": "user", "content": content}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert prompted(tokenizer, messages=messages) == tokens


def test_a_variable_of_the_template_reaches_it(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer.byte_level(tmp_path, chat_template="{{ mood }} fox"))
    assert decode(tokenizer, prompted(tokenizer, chat_template_kwargs={"mood": "lazy"})) == "lazy fox"


def test_what_an_assistant_thought_reaches_the_template(tmp_path):
    template = "{% for m in messages %}{{ m.reasoning_content or 'the' }} {{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(tiny_tokenizer.byte_level(tmp_path, chat_template=template))
    thought = {"role": "assistant", "reasoning_content": "quick", "content": "fox"}
    messages = [{"role": "user", "content": "dog "}, thought]
    assert decode(tokenizer, prompted(tokenizer, messages=messages)) == "the dog quick fox"


TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def test_tools_their_calls_and_what_came_of_them_reach_the_template(tokenizer):
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]
    assert decode(tokenizer, prompted(tokenizer, messages=messages, tools=TOOLS)) == (
        '<tools>[{"type": "function", "function": {"name": "weather"}}]</tools>\n'
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
    )
    unasked = prompted(tokenizer, tools=TOOLS, tool_choice="none")
    assert unasked == prompted(tokenizer)


def test_a_template_may_go_down_into_all_parameters_that_are_let_in(tmp_path):
    macro = "{% macro m(x) %}{% if x.a %}{{ m(x.a) }}{% endif %}{% endmacro %}"
    template = (
        macro
        + "{{ m(tools[0].function.parameters) }}{% if false %}<tool_call>{{ tool_call.name }}{% endif %}"
    )
    tokenizer = load_tokenizer(tiny_tokenizer.byte_level(tmp_path, chat_template=template))
    parameters = {}
    for _ in range(60):
        parameters = {"a": parameters}
    deep = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert prompted(tokenizer, tools=deep) == []


def test_calls_in_the_history_are_refused_where_no_template_makes_calls(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer.byte_level(tmp_path))
    with pytest.raises(ApiError, match="not known to make tool calls") as refusal:
        chat_tokens(
            tokenizer, chat(messages=[{"role": "tool", "tool_call_id": "a", "content": "rain"}]), ROOMY
        )
    assert refusal.value.param == "messages"


def test_tools_are_refused_where_no_template_makes_calls(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer.byte_level(tmp_path))
    with pytest.raises(ApiError, match="not known to make tool calls") as refusal:
        prompted(tokenizer, tools=TOOLS)
    assert (refusal.value.status, refusal.value.param) == (400, "tools")


def test_a_schema_becomes_a_grammar(tokenizer, tmp_path):
    def of(schema, tokenizer=tokenizer):
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        return grammar(tokenizer, chat(response_format=wanted))

    assert grammar(tokenizer, chat()) == ""
    assert '"integer"' in of({"type": "integer"})
    folder = tiny_tokenizer.byte_level(tmp_path)
    without = load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ApiError, match="has no tokenizer.json"):
        of({"type": "integer"}, without)


def test_required_calls_become_a_grammar_or_the_reason_why_not(tokenizer, monkeypatch):
    def of(**parameters):
        tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
        return grammar(tokenizer, chat(tools=tools, tool_choice="required"))

    assert "weather" in of()
    with pytest.raises(ApiError, match="the parameters of weather are no object") as refusal:
        of(type="string")
    assert (refusal.value.status, refusal.value.param) == (400, "tool_choice")
    monkeypatch.setattr(tokenizer, "_tool_parser", qwen3_coder.parse_tool_call)
    with pytest.raises(ApiError, match="does not write its calls as JSON"):
        of()
    monkeypatch.setattr(tokenizer, "_tool_parser", glm47.parse_tool_call)
    with pytest.raises(ApiError, match="does not write its calls as JSON"):
        of()


@pytest.mark.parametrize(
    "name", sorted(names(PreTrainedTokenizerBase.apply_chat_template) | names(render_jinja_template))
)
def test_what_is_no_variable_of_the_template_is_refused_by_name(tokenizer, name):
    with pytest.raises(ApiError, match=f"^{name} is set by the server") as refusal:
        prompted(tokenizer, chat_template_kwargs={name: 2_000_000})
    assert (refusal.value.status, refusal.value.param) == (400, "chat_template_kwargs")


def test_token_ids_are_taken_as_they_are(tokenizer):
    assert text_tokens(tokenizer, [5, 6], ROOMY) == [5, 6]
    assert decode(tokenizer, text_tokens(tokenizer, "the fox", ROOMY)) == "the fox"


def test_a_seed_gives_each_choice_its_own_seed():
    seeds = [r.sampling.seed for r in engine_requests(chat(seed=5, n=3), [1], ROOM, [7])]
    assert seeds == [5, 6, 7]
    assert one(chat(seed=-1)).sampling.seed == 2**63 - 1
    assert one(chat()).sampling.seed != one(chat()).sampling.seed


def test_all_choices_share_one_prompt():
    prompt = [1, 2, 3]
    assert all(r.prompt is prompt for r in engine_requests(chat(n=5), prompt, ROOM, [7]))


def test_each_field_reaches_the_engine():
    body = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=4,
    )
    sampling = one(body).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 3, 0.1)
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    assert penalties == (1.1, 0.2, -0.3)
    assert sampling.logit_bias == {5: -100}
    assert sampling.logprobs == 4
    assert one(chat(logprobs=True)).sampling.logprobs == 0
    assert one(chat()).sampling.logprobs is None
    assert one(chat(top_k=-1)).sampling.top_k == 0


def test_the_end_tokens_stop_unless_they_are_to_be_ignored():
    assert one(chat()).stop_tokens == [7]
    assert one(chat(ignore_eos=True)).stop_tokens == []


def test_the_answer_may_be_as_long_as_there_is_room():
    assert one(chat()).max_tokens == 30
    assert one(chat(), range(1, 31)).max_tokens == 20
    assert one(complete()).max_tokens == 16
    assert one(complete(max_tokens=0, echo=True)).max_tokens == 1


@pytest.mark.parametrize(
    ("body", "prompt", "reason"),
    [
        (chat(max_tokens=48), [1, 2, 3], "3 tokens and the answer may have 48.*holds 50: ask for at most 47"),
        (chat(logit_bias={"100": 1}), [1], "Token 100 is not"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(body, prompt, reason):
    with pytest.raises(ApiError, match=reason) as refusal:
        one(body, prompt)
    assert refusal.value.status == 400


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([1] * 41, "41 tokens; at most 40"),
        ([], "no tokens"),
        ([100], "Token 100 is not in the vocabulary of 100"),
        ("z" * 50, "50 tokens; at most 40"),
        ("z" * 10**8, "more than 640 tokens; at most 40"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_prompt_that_cannot_be_is_refused_with_the_numbers(tokenizer, prompt, reason):
    with pytest.raises(ApiError, match=reason) as refusal:
        text_tokens(tokenizer, prompt, ROOM)
    assert (refusal.value.status, refusal.value.param) == (400, "prompt")
    if "z" in prompt:
        with pytest.raises(ApiError, match="at most 40 are possible") as refusal:
            chat_tokens(tokenizer, chat(messages=[{"role": "user", "content": prompt}]), ROOM)
        assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")


def test_a_long_text_of_few_tokens_is_taken(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizer.byte_level(tmp_path))
    text = "<|im_end|>" * 30
    assert len(text) > 30 * 8
    room = Room(vocab_size=1000, max_context=31, max_prompt_tokens=30, default_max_tokens=1)
    assert text_tokens(tokenizer, text * 1, room) == [1] * 30


def test_an_echo_with_logprobs_scores_the_prompt():
    assert one(complete(echo=True, logprobs=1)).prompt_logprobs
    assert not one(complete(echo=True)).prompt_logprobs
    assert not one(complete(logprobs=1)).prompt_logprobs
