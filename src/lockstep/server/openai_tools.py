"""In OpenAI's requests: what an answer may call, or has to, and what it has to fit."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lockstep.server.openai_fields import Strict, Text, as_text


class NamedSchema(Strict):
    schema_: Annotated[dict[str, Any], AfterValidator(as_text)] | None = Field(None, alias="schema")
    """A JSON schema; None for any object."""
    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None
    """The answer fits the schema in any case."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(as_text)] | None = Field(None, alias="schema")
    """Of a json_object, as llama.cpp's server takes it."""

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("the type json_schema and json_schema need each other")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError(f"the type {self.type} takes no schema beside it")
        return self

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """What the text has to fit; None for any text."""
        if self.type == "text":
            return None
        return (self.json_schema and self.json_schema.schema_) or self.schema_ or {"type": "object"}


def _arguments(text: str) -> str:
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"arguments are not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("arguments are not a JSON object")
    as_text(content)
    return text


class Function(Strict):
    name: Annotated[Text, Field(min_length=1, max_length=256)]


class FunctionDefinition(Function):
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(as_text)] | None = None
    """A JSON schema, which the model is shown, and held to where a call is required."""
    strict: bool | None = None


class CalledFunction(Function):
    arguments: Annotated[Text, AfterValidator(_arguments)]


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class ToolChoice(Strict):
    type: Literal["function"]
    function: Function


class ToolCall(Strict):
    """A call that an earlier answer asked for."""

    id: Text
    type: Literal["function"]
    function: CalledFunction
