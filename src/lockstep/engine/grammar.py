"""Answers that have to match a grammar: which tokens may come next, as llguidance finds out."""

from __future__ import annotations

import json
from collections.abc import Sequence as Sequenced
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from lockstep.engine.request import Request
from lockstep.engine.sequence import Sequence

Allowed = NDArray[np.bool_]
"""Whether each token of the vocabulary may be drawn."""

TOKENIZER = "tokenizer.json"
"""In a model's folder: the form of tokenizer that llguidance reads."""

REMEMBERED = 32
"""Grammars that are kept ready: clients ask for the same again and again."""

WHITE_SPACE = r"[ \t\n]{0,64}"
"""Between the parts of JSON: enough to indent it, but a small model must not be able to go on for ever."""


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON that fits `schema`, whether it can be followed or not."""
    options: Any = {"whitespace_pattern": WHITE_SPACE}
    return LLMatcher.grammar_from_json_schema(_without_options(schema), overrides=options)


def lark_grammar(rules: Sequenced[str]) -> str:
    """The grammar of these rules, in llguidance's kind of Lark, whether it can be followed or not."""
    return LLMatcher.grammar_from_lark("\n".join(rules))


def json_rule(name: str, schema: dict[str, Any]) -> str:
    """The rule of that name for JSON that fits `schema`."""
    limited = _without_options(schema) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
    return f"{name}: %json {json.dumps(limited)}"


def _without_options(schema: dict[str, Any]) -> dict[str, Any]:
    """Options of the compiler are not for clients: some make it lenient."""
    return {key: value for key, value in schema.items() if key != "x-guidance"}


class Grammars:
    """Follows each answer through its grammar, on rank 0 only."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """`folder` is the model's; its tokenizer is read when the first answer with a grammar comes."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._tokenizer = lru_cache(1)(self._read_tokenizer)
        self._compiled = lru_cache(REMEMBERED)(self._compile)
        self._followed: WeakKeyDictionary[Sequence, tuple[LLMatcher, int]] = WeakKeyDictionary()

    def refusal(self, request: Request) -> str:
        """Why no answer to this request can be held to its grammar; empty if it can."""
        if not request.sampling.grammar:
            return ""
        try:
            return self._compiled(request.sampling.grammar, tuple(request.stop_tokens)).get_error()
        except ValueError as error:
            return f"Answers of this model cannot be held to a form: {error}"

    def allowed(self, row: Sequence) -> Allowed | None:
        """Which tokens may be drawn next; None for all.

        A text that matches whole can only end. So can one that went astray: it does not match all the same,
        or what may follow is too complex to find out.
        """
        if not row.sampling.grammar:
            return None
        matcher, seen = self._followed.get(row) or (self._begin(row), 0)
        matcher.consume_tokens(row.generated[seen:])
        self._followed[row] = matcher, len(row.generated)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        row.astray = matcher.is_error()
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(np.bool_)

    def _begin(self, row: Sequence) -> LLMatcher:
        return self._compiled(row.sampling.grammar, tuple(row.request.stop_tokens)).deep_copy()

    def _compile(self, grammar: str, stop_tokens: tuple[int, ...]) -> LLMatcher:
        return LLMatcher(self._tokenizer(stop_tokens), grammar, log_level=0)

    def _read_tokenizer(self, stop_tokens: tuple[int, ...]) -> LLTokenizer:
        """Raises ValueError for a kind of tokenizer that llguidance does not know."""
        file = str(self._folder / TOKENIZER)
        return LLTokenizer(file, n_vocab=self._vocab_size, eos_token=list(stop_tokens))
