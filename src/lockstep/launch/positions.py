"""JSON with the line of every list entry and object member, so that an error can name the line at fault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_decoder = json.JSONDecoder()
_space = re.compile(r"[\s,:]*")


def members(text: str, start: int) -> Iterator[tuple[str, Any, int]]:
    """Key, value and the value's position for each member of the object at `start` of valid JSON."""
    at = _skip(text, start + 1)
    while text[at] != "}":
        key, at = _decoder.raw_decode(text, at)
        at = _skip(text, at)
        value, end = _decoder.raw_decode(text, at)
        yield key, value, at
        at = _skip(text, end)


def entries(text: str, start: int) -> Iterator[tuple[Any, int]]:
    """Value and position of each entry of the list at `start` of valid JSON."""
    at = _skip(text, start + 1)
    while text[at] != "]":
        value, end = _decoder.raw_decode(text, at)
        yield value, at
        at = _skip(text, end)


def beginning(text: str) -> int:
    """Where the value of a document starts."""
    return _skip(text, 0)


def line_of(text: str, position: int) -> int:
    """Line number, from 1."""
    return text.count("\n", 0, position) + 1


def _skip(text: str, at: int) -> int:
    found = _space.match(text, at)
    assert found is not None
    return found.end()
