"""From token ids to text, in pieces that no later token and no stop string can change."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lockstep.errors import UsageError, in_a_line
from lockstep.model import checkpoint
from lockstep.model.headers import AGAIN

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER_TOKENS = 4
"""A character of UTF-8 has at most four bytes, so at most four tokens."""


class Tokenizer(Protocol):
    """What is used of mlx-lm's tokenizer wrapper, which passes calls on to the model's own tokenizer."""

    eos_token_ids: set[int]
    has_chat_template: bool
    name_or_path: str
    model_max_length: int
    has_tool_calling: bool
    has_thinking: bool

    @property
    def think_start(self) -> str: ...

    @property
    def think_end(self) -> str: ...

    @property
    def tool_call_start(self) -> str: ...

    @property
    def tool_call_end(self) -> str: ...

    @property
    def tool_parser(self) -> Callable[[str, list[dict[str, Any]]], Any]: ...

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **options: Any) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with the end tokens that its configuration names.

    Raises UsageError where there is none, or one that its library does not understand.
    """
    checkpoint.check_tokenizer(folder)
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    from mlx_lm.utils import load_config  # noqa: PLC0415  (2 s)
    from mlx_lm.utils import load_tokenizer as load

    # Importing mlx_lm lowers the number of open files to 2048; a server has one for each client.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(open_files[0], hard), hard))
    eos_token_ids = load_config(folder).get("eos_token_id")
    try:
        tokenizer: Tokenizer = load(folder, eos_token_ids=eos_token_ids)
        # The first call may set the truncation of the shared tokenizer, which must not happen in two threads.
        tokenizer.encode("a")
    except Exception as error:  # Its libraries raise whatever they stumble over in a file.
        what = in_a_line(error)
        raise UsageError(f"{folder} has a tokenizer that cannot be loaded ({what}): {AGAIN}") from error
    # Transformers would warn of longer texts; whoever takes them says what is too long.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of these tokens, special ones included, with their spaces as they are."""
    return tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Detokenizer:
    """`add` one token after the other; the pieces joined are `decode` of all tokens.

    Only the tokens since the last character border are decoded again, with the ones of the piece before,
    because what a token looks like may depend on whether it comes first. For the same reason `after` holds
    the tokens of a text that goes on here; nothing of them is shown.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = _tail(tokenizer, after)
        self._piece: list[int] = []
        self._shown = len(decode(tokenizer, self._window))

    def add(self, token: int) -> str:
        """The text that is certain now; empty in the middle of a character."""
        self._window.append(token)
        self._piece.append(token)
        text = decode(self._tokenizer, self._window)
        held = self._unfinished(text)
        new = text[self._shown : len(text) - held]
        self._shown = max(self._shown, len(text) - held)
        if not held or len(self._piece) > 2 * LONGEST_CHARACTER_TOKENS:
            self._restart(held)
        return new

    def _unfinished(self, text: str) -> int:
        """How many characters at the end of `text` may be the first bytes of one that is not complete."""
        if not text.endswith(REPLACEMENT):
            return 0
        if len(self._piece) < LONGEST_CHARACTER_TOKENS:
            # Not only the run at the end: one bad byte makes some decoders replace the good ones before it.
            return max(len(text) - self._shown, 0)
        return min(len(text) - len(text.rstrip(REPLACEMENT)), LONGEST_CHARACTER_TOKENS - 1)

    def finish(self) -> str:
        """What was held back for a character that never ended."""
        rest = decode(self._tokenizer, self._window)[self._shown :]
        self._window, self._piece, self._shown = [], [], 0
        return rest

    def _restart(self, held: int) -> None:
        self._window = self._piece[-LONGEST_CHARACTER_TOKENS - 1 :]
        self._piece = self._window[1:] if held else []
        self._shown = max(len(decode(self._tokenizer, self._window)) - held, 0)


def _tail(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """The last few tokens: as many as may be, but from a character border on."""
    tails = [list(tokens[-length:]) for length in range(LONGEST_CHARACTER_TOKENS + 1, 0, -1)]
    return min(tails, key=lambda tail: decode(tokenizer, tail).count(REPLACEMENT))


class StopStrings:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [s for s in stop if s]
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The part of the text so far that is certainly before any stop string."""
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max((overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """The text of one answer, token by token, ended by the first stop string, which is never shown.

    `after` is the prompt of an answer that continues its text, rather than being a text of its own.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, after)
        self.tokenizer = tokenizer
        self._stop = StopStrings(stop)
        self.decoded = 0
        """Characters decoded so far: the offset at which the next token's text starts."""
        self.shown = 0
        """Characters given out so far."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing follows it."""
        return self._stop.found is not None

    def feed(self, token: int) -> str:
        """The text that may be shown now that this token is known."""
        return self._pass(self._detokenizer.add(token))

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._pass(self._detokenizer.finish())
        if self.stopped:
            return text
        rest = self._stop.finish()
        self.shown += len(rest)
        return text + rest

    def _pass(self, text: str) -> str:
        self.decoded += len(text)
        shown = self._stop.feed(text)
        self.shown += len(shown)
        return shown


_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTE_OF_CHARACTER = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in set(_PRINTABLE))
}
"""GPT-2's printable stand-in for each byte, which byte-level vocabularies are written in."""


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of one token by itself, also where they are only part of a character."""
    text = decode(tokenizer, [token])
    if REPLACEMENT not in text:
        return text.encode()
    name = tokenizer.convert_ids_to_tokens(token) or ""
    if len(name) == 6 and name.startswith("<0x"):
        return bytes([int(name[3:5], 16)])
    if all(c in _BYTE_OF_CHARACTER for c in name):
        return bytes(_BYTE_OF_CHARACTER[c] for c in name)
    return text.encode()
