"""One prompt, one answer: what `lockstep generate` runs on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from lockstep.engine.request import Finished, Rejected, Request
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.text import TextStream, Tokenizer, load_tokenizer
from lockstep.errors import UsageError
from lockstep.runtime.opening import open_session
from lockstep.runtime.options import EngineOptions, ModelOptions, Prompt, Tell
from lockstep.runtime.place import Place
from lockstep.runtime.session import Member, Session
from lockstep.runtime.source import SingleRequest


class Answer(msgspec.Struct, frozen=True):
    """The result of one generation. `tokens_per_s` counts decoding only, after the first token."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    tokens_per_s: float
    backend: str
    parallel: str
    model: str
    ranks: list[Member]


def generate(
    place: Place,
    options: ModelOptions,
    prompt: Prompt,
    tell: Tell,
    on_text: Callable[[str], None],
) -> Answer | None:
    """Generate on all ranks; rank 0 streams text to `on_text` and returns the answer, others None.

    Raises UsageError for a prompt that cannot be served, LostPeer when another rank ends.
    """
    return open_session(place, options, tell).run(lambda session: _answer(session, prompt, tell, on_text))


def _answer(session: Session, prompt: Prompt, tell: Tell, on_text: Callable[[str], None]) -> Answer:
    tokenizer = load_tokenizer(session.path)
    watch = _Stopwatch()
    raw = prompt.raw or not tokenizer.has_chat_template
    tokens = _encode(tokenizer, prompt.text, raw)
    text = TextStream(tokenizer, list(prompt.stop), after=tokens if raw else ())

    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        with session.watchdog.progress.outside():
            on_text(piece)

    def on_token(token: int) -> bool:
        watch.token()
        show(text.feed(token))
        return not text.stopped

    request = Request(
        id="generate",
        prompt=tokens,
        max_tokens=prompt.max_tokens,
        stop_tokens=sorted(tokenizer.eos_token_ids),
        sampling=prompt.sampling,
    )
    source = SingleRequest(request, on_token)
    scheduler = Scheduler(session.limits(EngineOptions(prompt_cache_tokens=0)))
    tell("generating")
    watch.start()
    session.lead(scheduler, source)
    if isinstance(source.outcome, Rejected):
        raise UsageError(source.outcome.reason)
    assert isinstance(source.outcome, Finished)
    show(text.finish())
    return Answer(
        text="".join(shown),
        token_ids=source.token_ids,
        finish_reason="stop" if text.stopped else source.outcome.reason,
        prompt_tokens=len(request.prompt),
        completion_tokens=len(source.token_ids),
        ttft_s=watch.ttft_s,
        tokens_per_s=watch.tokens_per_s,
        backend=session.backend,
        parallel=session.parallel,
        model=session.name,
        ranks=list(session.members),
    )


def _encode(tokenizer: Tokenizer, text: str, raw: bool) -> list[int]:
    if raw:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


class _Stopwatch:
    """Time to the first token, and the rate of those after it."""

    def __init__(self) -> None:
        self._started = self._first = self._last = 0.0
        self._tokens = 0

    def start(self) -> None:
        self._started = time.perf_counter()

    def token(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._tokens += 1

    @property
    def ttft_s(self) -> float:
        return self._first - self._started if self._tokens else 0.0

    @property
    def tokens_per_s(self) -> float:
        return (self._tokens - 1) / (self._last - self._first) if self._tokens > 1 else 0.0
