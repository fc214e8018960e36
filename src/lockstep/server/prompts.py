"""From a request's body to prompt tokens and engine requests. Pure, but for the random seed."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from lockstep.engine.grammar import TOKENIZER, json_grammar
from lockstep.engine.request import Request, Sampling
from lockstep.engine.text import Tokenizer
from lockstep.server.errors import ApiError
from lockstep.server.openai import ChatMessage, ChatRequest, GenerationRequest
from lockstep.server.tools import calls_grammar, writes_json

SEEDS = 2**63
CHARACTERS_PER_TOKEN = 16
"""More than any usual text has."""
RESERVED = frozenset(
    ["self", "conversation", "conversations", "messages", "tools", "documents", "chat_template"]
    + ["add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens"]
    + ["padding", "truncation", "max_length", "tokenizer_kwargs"]
    + ["return_tensors", "return_dict", "return_assistant_tokens_mask"]
)
"""Names that transformers' chat templating takes for itself; any other is a variable of the template."""


@dataclass(frozen=True)
class Room:
    """What the model and the server's settings leave for prompt and answer, in tokens."""

    vocab_size: int
    max_context: int
    max_prompt_tokens: int
    default_max_tokens: int

    @property
    def most_prompt_tokens(self) -> int:
        """Those of a prompt that leaves room for a token."""
        return min(self.max_prompt_tokens, self.max_context - 1)


def chat_tokens(tokenizer: Tokenizer, body: ChatRequest, room: Room) -> list[int]:
    """The prompt as the model's own chat template writes it. Raises `ApiError` for what cannot be."""
    if not tokenizer.has_chat_template:
        raise ApiError(400, "This model has no chat template; use /v1/completions.", param="messages")
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    if taken := sorted(RESERVED & variables.keys()):
        reason = f"{taken[0]} is set by the server and no variable of the chat template; leave it out."
        raise ApiError(400, reason, param="chat_template_kwargs")
    tools = body.callable_tools
    called = any(message.tool_calls or message.role == "tool" for message in body.messages)
    if (tools or called) and not tokenizer.has_tool_calling:
        reason = "The chat template of this model is not known to make tool calls; leave tools out."
        raise ApiError(400, reason, param="tools" if tools else "messages")
    try:
        prompt: str = tokenizer.apply_chat_template(
            [_for_template(message) for message in body.messages],
            tools=tools or None,
            add_generation_prompt=True,
            tokenize=False,
            **variables,
        )
    except (TemplateError, TypeError, ValueError, RecursionError) as error:
        # Templates refuse what their model was not trained on, such as two user messages in a row.
        complaint = f"The model's chat template does not take these messages: {error}"
        raise ApiError(400, complaint, param="messages") from error
    return _encode(tokenizer, prompt, room, "messages", add_special_tokens=False)


def _for_template(message: ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role, "content": message.text}
    if message.reasoning_content is not None:
        told["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        told["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for call in told["tool_calls"]:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
        told |= {"name": message.name} if message.name else {}
    return told


def text_tokens(tokenizer: Tokenizer, prompt: str | list[int], room: Room) -> list[int]:
    """A text completion's prompt; token ids are taken as they are. Raises `ApiError` for what cannot be."""
    tokens = _encode(tokenizer, prompt, room, "prompt") if isinstance(prompt, str) else prompt
    if not tokens:
        raise ApiError(400, "The prompt has no tokens.", param="prompt")
    if max(tokens) >= room.vocab_size:
        message = f"Token {max(tokens)} is not in the vocabulary of {room.vocab_size} tokens."
        raise ApiError(400, message, param="prompt")
    _check_length(tokens, room, "prompt")
    return tokens


def _encode(
    tokenizer: Tokenizer, text: str, room: Room, param: str, add_special_tokens: bool = True
) -> list[int]:
    """The tokens of `text`, of which a part tells whether there are far too many: all would take a minute."""
    most = CHARACTERS_PER_TOKEN * room.most_prompt_tokens
    if len(text) > most:
        _check_length(tokenizer.encode(text[:most], add_special_tokens=False), room, param, "more than ")
    tokens = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    _check_length(tokens, room, param)
    return tokens


def _check_length(tokens: Sequence[int], room: Room, param: str, about: str = "") -> None:
    if len(tokens) > room.most_prompt_tokens:
        limit = room.most_prompt_tokens
        message = f"The prompt has {about}{len(tokens)} tokens; at most {limit} are possible here."
        raise ApiError(400, message, code="context_length_exceeded", param=param)


def grammar(tokenizer: Tokenizer, body: GenerationRequest) -> str:
    """What the text of each answer has to match, whether that can be followed or not; empty for any text."""
    if not body.is_constrained:
        return ""
    schema = body.schema_of_text
    tools = body.required_tools or (body.callable_tools if schema is not None else [])
    param = _constraint(body)
    if not (Path(tokenizer.name_or_path) / TOKENIZER).exists():
        reason = f"This model has no {TOKENIZER}, without which its answers cannot be held to a form."
        raise ApiError(400, reason, param=param)
    if tools and not writes_json(tokenizer):
        reason = "This model does not write its calls as JSON, so no answer can be held to them."
        raise ApiError(400, reason, param=param)
    try:
        if tools:
            return calls_grammar(tokenizer, tools, body.most_calls, None if body.required_tools else schema)
        assert schema is not None, "a body without required tools is constrained by its schema"
        return json_grammar(schema)
    except ValueError as error:
        raise unfollowable(body, str(error)) from error


def unfollowable(body: GenerationRequest, reason: str) -> ApiError:
    """What is wrong with a schema in the request."""
    shown = " ".join(reason.split())[:300]
    return ApiError(400, f"This JSON schema cannot be followed: {shown}", param=_constraint(body))


def _constraint(body: GenerationRequest) -> str:
    """The field that not every text will do for."""
    return "tool_choice" if body.required_tools else "response_format"


def engine_requests(
    body: GenerationRequest, prompt: list[int], room: Room, eos_tokens: Collection[int], grammar: str = ""
) -> list[Request]:
    """`n` requests for one prompt, which differ in their seeds only. Raises `ApiError` for what cannot be."""
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed % SEEDS
    return [
        Request(
            id=uuid.uuid4().hex,
            prompt=prompt,
            max_tokens=_answer_tokens(body, len(prompt), room),
            stop_tokens=[] if body.ignore_eos else sorted(eos_tokens),
            sampling=_sampling(body, (seed + i) % SEEDS, room.vocab_size, grammar),
            prompt_logprobs=body.scores_prompt,
        )
        for i in range(body.answers)
    ]


def _answer_tokens(body: GenerationRequest, prompt_tokens: int, room: Room) -> int:
    free = room.max_context - prompt_tokens
    asked = body.token_limit
    if asked is None:
        return min(free, body.default_max_tokens or room.default_max_tokens)
    if asked > free:
        message = (
            f"The prompt has {prompt_tokens} tokens and the answer may have {asked}, "
            f"but the context holds {room.max_context}: ask for at most {free}."
        )
        raise ApiError(400, message, code="context_length_exceeded", param="max_tokens")
    # Scoring a prompt without an answer takes one token, which is not shown.
    return max(asked, 1)


def _sampling(body: GenerationRequest, seed: int, vocab_size: int, grammar: str) -> Sampling:
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if bias and max(bias) >= vocab_size:
        message = f"Token {max(bias)} is not in the vocabulary of {vocab_size} tokens."
        raise ApiError(400, message, param="logit_bias")
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(int(_or(body.top_k, 0)), 0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        logit_bias=bias,
        seed=seed,
        logprobs=body.alternatives,
        grammar=grammar,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
