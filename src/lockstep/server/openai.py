"""The bodies of OpenAI's chat and text completion requests, as far as they can be honoured.

Unknown fields are ignored, as OpenAI's own server does. A known field that this server cannot honour is
refused unless its value asks for nothing.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lockstep.server.openai_fields import Bias, Refused, StopString, Strict, Text, Token, TokenName
from lockstep.server.openai_tools import (
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
)


class StreamOptions(Strict):
    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What chat and text completions have in common."""

    continues_prompt: ClassVar[bool] = False
    """Whether the answer goes on with the prompt's text, rather than being a text of its own."""
    default_max_tokens: ClassVar[int | None] = None
    """None leaves it to the server."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model: Annotated[Text, Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    user: Text | None = None
    ignore_eos: bool | None = None
    """Go on to `max_tokens` whatever the model says; for measurements."""

    response_format: ResponseFormat | None = None

    @property
    def token_limit(self) -> int | None:
        """Most tokens of each answer, where the client says."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token; None reports no probabilities."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens are reported with their probabilities."""
        return self.echoes and self.alternatives is not None

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates and parsers take them."""
        return []

    @property
    def required_tools(self) -> list[dict[str, Any]]:
        """Those of which it has to call one; empty if it need not."""
        return []

    @property
    def most_calls(self) -> int | None:
        """How many calls there may be in one answer; None for any number."""
        return None

    @property
    def prompt_count(self) -> int:
        """How many prompts there are."""
        return 1

    @property
    def may_think(self) -> bool:
        """Whether an answer may begin with what the model thinks, which is told apart."""
        return False

    @property
    def answers(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """The JSON schema that each answer has to fit; None for any text."""
        return self.response_format.schema_of_text if self.response_format else None

    @property
    def is_constrained(self) -> bool:
        """Whether not every text will do."""
        return self.schema_of_text is not None or bool(self.required_tools)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are only for stream: true")
        return self

    @model_validator(mode="after")
    def _a_constrained_text_ends(self) -> GenerationRequest:
        if self.is_constrained and self.ignore_eos:
            raise ValueError("ignore_eos excludes a response_format with JSON, and calls that are required")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    """What an assistant thought before it said `content`; chat templates decide what to show of it."""
    content: Text | Annotated[list[TextPart], Field(min_length=1)] | None = Field(None, validate_default=True)
    """Only an assistant that calls tools may say nothing."""
    function_call: Annotated[Any, Refused()] = None
    audio: Annotated[Any, Refused()] = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or [])

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: object) -> object:
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind != "text":
                raise ValueError(f"parts of type {kind[:40]!r} are not supported, only text")
        return content

    @field_validator("content")
    @classmethod
    def _says_or_calls(cls, content: object, info: ValidationInfo) -> object:
        if content is None and not info.data.get("tool_calls"):
            raise ValueError("it is missing")
        return content

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are only for the role assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("the role tool and tool_call_id need each other")
        return self


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[Text, bool | int | float | Text | None] | None = None
    """Passed to the model's chat template, such as `enable_thinking`."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """Passed to the chat template, where it has such a variable."""

    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, Refused([])] = None
    function_call: Annotated[Any, Refused("none", "auto")] = None
    modalities: Annotated[Any, Refused(["text"])] = None
    audio: Annotated[Any, Refused()] = None
    web_search_options: Annotated[Any, Refused()] = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @cached_property
    def callable_tools(self) -> list[dict[str, Any]]:
        offered = [] if self.tool_choice == "none" else self.tools or []
        return [tool.model_dump(exclude_none=True) for tool in offered]

    @property
    def required_tools(self) -> list[dict[str, Any]]:
        if isinstance(self.tool_choice, ToolChoice):
            chosen = self.tool_choice.function.name
            return [tool for tool in self.callable_tools if tool["function"]["name"] == chosen]
        return self.callable_tools if self.tool_choice == "required" else []

    @property
    def may_think(self) -> bool:
        return not self.is_constrained

    @property
    def most_calls(self) -> int | None:
        one = self.parallel_tool_calls is False or isinstance(self.tool_choice, ToolChoice)
        return 1 if one else None

    @model_validator(mode="after")
    def _a_required_tool_is_there(self) -> ChatRequest:
        if self.tool_choice not in (None, "none", "auto") and not self.required_tools:
            raise ValueError("tool_choice asks for a call of something that is not among the tools")
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    continues_prompt: ClassVar[bool] = True
    default_max_tokens: ClassVar[int | None] = 16

    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    suffix: Annotated[Any, Refused("")] = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def prompt_count(self) -> int:
        return len(self.prompts)

    @cached_property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[t for t in self.prompt if isinstance(t, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    @model_validator(mode="after")
    def _as_many_as_can_be_done(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of > self.answers:
            raise ValueError(f"best_of {self.best_of} is more than n: choosing is not supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 only makes sense with echo: true")
        return self


def _field_names(*bodies: type[BaseModel]) -> frozenset[str]:
    schemas = [body.model_json_schema() for body in bodies]
    parts = [part for schema in schemas for part in (schema, *schema["$defs"].values())]
    return frozenset(name for part in parts for name in part.get("properties", {}))


FIELD_NAMES = _field_names(ChatRequest, CompletionRequest)
"""Every name that a body may hold, at any depth."""
