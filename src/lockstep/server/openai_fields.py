"""What single fields of OpenAI's requests may hold."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

MOST_LEVELS = 64
"""Of JSON within JSON; chat templates go through it level by level."""


class Strict(BaseModel):
    """A part of a request, whose fields hold just what they say: no text that looks like a number."""

    model_config = ConfigDict(strict=True)


class Refused:
    """Marks a field that is known but cannot be honoured; None and `harmless` ask for nothing."""

    def __init__(self, *harmless: object) -> None:
        self._harmless = harmless

    def _check(self, value: object, info: core_schema.ValidationInfo) -> object:
        if value is None or any(value == h and type(value) is type(h) for h in self._harmless):
            return value
        raise ValueError(f"{info.field_name} is not supported by this server; leave it out")

    def __get_pydantic_core_schema__(self, _: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self._harmless]}


def _encodable(text: str) -> str:
    """JSON can write half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half a surrogate pair") from error
    return text


def as_text(tree: dict[str, Any]) -> dict[str, Any]:
    """Any JSON that can be written to be read by the model."""
    if _is_deeper(tree, MOST_LEVELS):
        raise ValueError(f"it has more than {MOST_LEVELS} levels")
    _encodable(json.dumps(tree, ensure_ascii=False))
    return tree


def _is_deeper(tree: Any, levels: int) -> bool:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return levels < 0 or any(_is_deeper(item, levels - 1) for item in inner)


Text = Annotated[str, AfterValidator(_encodable)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
