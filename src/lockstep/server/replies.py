"""The bodies of OpenAI's answers, whole and in chunks."""

from __future__ import annotations

from typing import TypedDict

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """Of text completions; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CalledFunction(BaseModel):
    name: str
    arguments: str
    """JSON."""


class ToolCall(BaseModel):
    id: str
    type: str = "function"
    function: CalledFunction


class ToolCallDelta(ToolCall):
    index: int


class AssistantMessage(BaseModel):
    role: str = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class Head(TypedDict):
    """What every answer begins with."""

    id: str
    object: str
    created: int
    model: str


class _Reply(BaseModel):
    id: str
    object: str
    created: int
    model: str


class ChatCompletion(_Reply):
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Reply):
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Completion(_Reply):
    choices: list[TextChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "lockstep"
    max_context: int | None = None


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None
    retry_after: int | None = None


class ErrorReply(BaseModel):
    error: ErrorBody
