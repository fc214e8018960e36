"""In OpenAI's requests: what an answer may call, or has to, and what it has to fit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lockstep.server.openai_fields import FunctionName, Text, as_text, json_object


class NamedSchema(BaseModel):
    model_config = ConfigDict(strict=True)

    schema_: Annotated[dict[str, Any], AfterValidator(as_text)] | None = Field(None, alias="schema")
    """A JSON schema; None for any object."""
    name: Text | None = None
    description: Text | None = None
    strict: bool | None = None
    """The answer fits the schema in any case."""


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("the type json_schema and json_schema need each other")
        return self

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """What the text has to fit; None for any text."""
        if self.type == "text":
            return None
        return (self.json_schema and self.json_schema.schema_) or {"type": "object"}


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(strict=True)

    name: FunctionName
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(as_text)] | None = None
    """A JSON schema, which the model is shown, and held to where a call is required."""
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionDefinition


class FunctionChoice(BaseModel):
    model_config = ConfigDict(strict=True)

    name: FunctionName


class ToolChoice(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: FunctionChoice


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True)

    name: FunctionName
    arguments: Annotated[Text, AfterValidator(json_object)]


class ToolCall(BaseModel):
    """A call that an earlier answer asked for."""

    model_config = ConfigDict(strict=True)

    id: Text
    type: Literal["function"]
    function: CalledFunction
