"""Tool calls: cut out of a model's text between its own markers, and read by mlx-lm's parser for it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from lockstep.engine.grammar import json_rule, lark_grammar
from lockstep.engine.text import Tokenizer, overlap

UNREADABLE = (
    *(ValueError, SyntaxError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError),
)
"""What mlx-lm's parsers, and Python's under them, raise for text that a model has made up."""

NO_PARAMETERS = {"properties": {}, "additionalProperties": False}
"""Of a function that names none."""


class Call(NamedTuple):
    """A function that the model wants called; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


class ToolCalls:
    """The calls in one answer. What cannot be read as a call stays text, so that nothing is lost.

    White space behind a call is shown only if other text follows: it separates it from the next one.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[dict[str, Any]], most: int | None) -> None:
        """`tools` are those of the request; after `most` calls nothing is said any more."""
        self._start, self._end = tokenizer.tool_call_start, tokenizer.tool_call_end
        self._parse = tokenizer.tool_parser
        self._tools = list(tools)
        self._names = [tool["function"]["name"] for tool in tools]
        self._most = most
        self._inside = False
        self._behind = False
        self._held = ""
        self._space = ""
        self.count = 0

    @property
    def full(self) -> bool:
        """Whether there are as many calls as there may be."""
        return self.count == self._most

    def feed(self, text: str, last: bool = False, cut: bool = False) -> tuple[str, list[Call]]:
        """What is certainly text, and the calls that are complete; all that is left with the `last` text.

        Of an answer that was `cut` off, a call that has not come to its end is text.
        """
        shown, calls = "", list[Call]()
        self._held += text
        # Some models have no marker for the end: there a call ends with the answer.
        while (marker := self._end if self._inside else self._start) and marker in self._held:
            before, _, self._held = self._held.partition(marker)
            shown += self._read(before, marker, calls) if self._inside else self._show(before)
            self._inside = not self._inside
        if last or not self._inside:
            certain = len(self._held) - (0 if last else overlap(self._held, self._start))
            rest, self._held = self._held[:certain], self._held[certain:]
            if not self._inside:
                shown += self._show(rest)
            elif cut and self._end:
                shown += self._show(self._start + rest)
            else:
                shown += self._read(rest, "", calls)
        return shown, calls

    def _show(self, text: str) -> str:
        if self.full:
            return ""
        if self._behind and not text.strip():
            self._space += text
            return ""
        text, self._space, self._behind = self._space + text, "", False
        return text

    def _read(self, text: str, end: str, calls: list[Call]) -> str:
        """Append the calls in `text`; returns what is text after all."""
        try:
            parsed = self._parse(text, self._tools)
            read = [self._call(one) for one in (parsed if isinstance(parsed, list) else [parsed])]
            if not read:
                raise ValueError("no call")
        except UNREADABLE:
            return self._show(self._start + text + end)
        fitting = read if self._most is None else read[: self._most - self.count]
        calls += fitting
        self.count += len(fitting)
        self._space, self._behind = "", True
        return ""

    def _call(self, parsed: Any) -> Call:
        """Raises for what is no call of one of the tools, with a JSON object."""
        name, arguments = parsed["name"], parsed.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if name not in self._names or not isinstance(arguments, dict):
            raise ValueError(f"no call of {self._names}")
        own = str(parsed.get("id") or f"call_{uuid.uuid4().hex}")
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (own + text).encode()  # Half a surrogate pair could not be sent.
        return Call(own, name, text)


def writes_json(tokenizer: Tokenizer) -> bool:
    """Whether the model writes a call as a JSON object between its markers."""
    # Parsers of other ways of writing read JSON, too, but take text that looks like a number for one.
    call = {"name": "f", "arguments": {"a": "1"}}
    try:
        return bool(tokenizer.tool_parser(json.dumps(call), []) == call)
    except ValueError:
        return False


def calls_grammar(
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, Any]],
    most: int | None,
    schema: dict[str, Any] | None = None,
) -> str:
    """The grammar of texts that call these tools, at most once if `most` is 1, and say nothing else.

    With a `schema` they may be JSON that fits it, instead. Raises ValueError for a tool whose parameters are
    no object.
    """
    start, end = (_written(tokenizer, mark) for mark in (tokenizer.tool_call_start, tokenizer.tool_call_end))
    functions = [tool["function"] for tool in tools]
    any_of = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [
        "start: calls" if schema is None else "start: calls | said",
        "calls: call" if most == 1 or not end else r'calls: call ("\n" call)*',
        rf'call: {start} "\n" ({any_of}) "\n" {end}',
    ]
    if schema is not None:
        rules.append(json_rule("said", schema))
    for i, function in enumerate(functions):
        before = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        rules.append(f'call_{i}: {json.dumps(before)} arguments_{i} "}}"')
        # Each on its own: references in a schema are to its own root.
        parameters = {"type": "object"} | function.get("parameters", NO_PARAMETERS)
        if parameters["type"] != "object":
            raise ValueError(f"the parameters of {function['name']} are no object")
        rules.append(json_rule(f"arguments_{i}", parameters))
    return lark_grammar(rules)


def _written(tokenizer: Tokenizer, mark: str) -> str:
    """A marker in the notation of rules: the model's own token, if there is one."""
    tokens = tokenizer.encode(mark, add_special_tokens=False)
    if len(tokens) == 1:
        return f"<[{tokens[0]}]>"
    return json.dumps(mark) if mark else ""


def tool_calls(
    tokenizer: Tokenizer, tools: Sequence[dict[str, Any]], most: int | None = None
) -> ToolCalls | None:
    """What cuts the calls out of one answer; None without any `tools`."""
    return ToolCalls(tokenizer, tools, most) if tools else None
