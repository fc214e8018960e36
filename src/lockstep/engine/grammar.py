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
    """The grammar of JSON that fits `schema`. Raises ValueError for a schema that cannot be followed."""
    return _valid(LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITE_SPACE}))


def lark_grammar(rules: Sequenced[str]) -> str:
    """The grammar of these rules, in llguidance's kind of Lark. Raises ValueError for what is none."""
    return _valid(LLMatcher.grammar_from_lark("\n".join(rules)))


def json_rule(name: str, schema: dict[str, Any]) -> str:
    """The rule of that name for JSON that fits `schema`."""
    limited = {"x-guidance": {"whitespace_pattern": WHITE_SPACE}} | schema
    return f"{name}: %json {json.dumps(limited)}"


def _valid(grammar: str) -> str:
    if reason := LLMatcher.validate_grammar(grammar):
        raise ValueError(reason)
    return grammar


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

        A text that matches whole, or has left its grammar all the same, can only end.
        """
        if not row.sampling.grammar:
            return None
        matcher, seen = self._followed.get(row) or (self._begin(row), 0)
        matcher.consume_tokens(row.generated[seen:])
        self._followed[row] = matcher, len(row.generated)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(np.bool_)

    def _begin(self, row: Sequence) -> LLMatcher:
        return self._compiled(row.sampling.grammar, tuple(row.request.stop_tokens)).deep_copy()

    def _compile(self, grammar: str, stop_tokens: tuple[int, ...]) -> LLMatcher:
        return LLMatcher(self._tokenizer(stop_tokens), grammar, log_level=0)

    def _read_tokenizer(self, stop_tokens: tuple[int, ...]) -> LLTokenizer:
        """Raises ValueError for a kind of tokenizer that llguidance does not know."""
        file = str(self._folder / TOKENIZER)
        return LLTokenizer(file, n_vocab=self._vocab_size, eos_token=list(stop_tokens))
