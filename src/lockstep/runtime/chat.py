"""A conversation in the terminal: what `lockstep chat` runs on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lockstep.engine.request import Command, Event, Finished, Rejected, Request, Sampling, Token
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.text import TextStream, Tokenizer, load_tokenizer
from lockstep.model.cache import expanded
from lockstep.runtime.opening import open_session
from lockstep.runtime.options import EngineOptions, ModelOptions, Tell
from lockstep.runtime.place import Place
from lockstep.runtime.session import Session

HELP = "/reset forgets the conversation, /save FILE writes it as JSON, /exit ends."

Ask = Callable[[], str | None]
"""Asks for the next line; None when there are no more."""

Show = Callable[[str], None]


def chat(
    place: Place,
    options: ModelOptions,
    sampling: Sampling,
    max_tokens: int,
    tell: Tell,
    ask: Ask,
    show: Show,
) -> None:
    """Talk until there are no more lines. Raises LockstepError when the run cannot start or go on."""

    def converse(session: Session) -> None:
        scheduler = Scheduler(session.limits(EngineOptions()))
        tokenizer = load_tokenizer(session.path)
        waits = session.watchdog.progress.outside()
        session.lead(scheduler, Conversation(tokenizer, sampling, max_tokens, waits(ask), waits(show)))

    open_session(place, options, tell).run(converse)


class Conversation:
    """A source that asks a person for the next request whenever the engine is idle."""

    def __init__(
        self, tokenizer: Tokenizer, sampling: Sampling, max_tokens: int, ask: Ask, show: Show
    ) -> None:
        self.closed = False
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._ask = ask
        self._show = show
        self._messages: list[dict[str, str]] = []
        self._commands: list[Command] = []
        self._text = TextStream(tokenizer)
        self._answer = ""
        self._turns = 0

    def poll(self) -> Sequence[Command]:
        commands, self._commands = self._commands, []
        return commands

    def wait(self) -> None:
        line = self._ask()
        text = "/exit" if line is None else line.strip()
        if text == "/exit":
            self.closed = True
        elif text.startswith("/"):
            self._show(self._obey(text) + "\n")
        elif text:
            self._begin(text)

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Token(token=token):
                    self._add(self._text.feed(token))
                case Finished():
                    self._add(self._text.finish())
                    self._messages.append({"role": "assistant", "content": self._answer})
                    self._show("\n")
                case Rejected(reason=reason):
                    self._messages.pop()
                    self._show(f"{reason}\n")

    def _begin(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        self._text, self._answer = TextStream(self._tokenizer), ""
        self._turns += 1
        prompt = self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True)
        self._commands.append(
            Request(
                id=f"turn-{self._turns}",
                prompt=list(prompt),
                max_tokens=self._max_tokens,
                stop_tokens=sorted(self._tokenizer.eos_token_ids),
                sampling=self._sampling,
            )
        )

    def _add(self, text: str) -> None:
        self._answer += text
        self._show(text)

    def _obey(self, line: str) -> str:
        name, _, argument = line.partition(" ")
        if name == "/reset":
            self._messages.clear()
            return "Forgotten."
        if name == "/save" and argument:
            return self._save(expanded(argument.strip()))
        return HELP

    def _save(self, path: Path) -> str:
        text = json.dumps(self._messages, ensure_ascii=False, indent=2) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            return f"cannot write {path}: {error.strerror}"
        except ValueError as error:  # Of a null character in the path.
            return f"cannot write {str(path)!r}: {error}"
        return f"Saved {len(self._messages)} messages to {path}."
