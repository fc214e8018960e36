"""Ranks without a model: caches are lists of tokens, and the next token is a hash of all before it.

`FakeRanks` says what each edit means, without mercy: a step that names a batch, a row or an entry that
is not there fails. `Simulation` drives a scheduler with it and checks every step that it is given.
"""

from __future__ import annotations

from collections import Counter, deque

from lockstep.engine.limits import Limits
from lockstep.engine.request import (
    Event,
    Finished,
    Logprobs,
    PromptLogprobs,
    Rejected,
    Request,
    Sampled,
    Token,
)
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.step import Create, Decode, Edit, Evict, Keep, Move, Prefill, Restore, Save, Step

VOCABULARY = 50


def next_token(known: list[int]) -> int:
    return hash(tuple(known)) % VOCABULARY


def solo(request: Request, max_context: int) -> tuple[list[int], str]:
    """What a request must answer, and why it ends."""
    generated = list(request.generated)
    while len(generated) < min(request.max_tokens, max_context - len(request.prompt)):
        token = next_token(request.prompt + generated)
        if token in request.stop_tokens:
            return generated, "stop"
        generated.append(token)
    return generated, "length"


class FakeRanks:
    def __init__(self) -> None:
        self.batches: dict[int, list[list[int]]] = {}
        self.entries: dict[int, list[int]] = {}
        self.drawn: dict[int, list[int]] = {}
        """By batch, what its last decode drew, as long as its rows are the same."""

    @property
    def tokens(self) -> int:
        """What caches hold: a batch pads its rows to the longest."""
        padded = sum(len(rows) * max(map(len, rows)) for rows in self.batches.values())
        return padded + self.entry_tokens

    @property
    def entry_tokens(self) -> int:
        return sum(map(len, self.entries.values()))

    def edit(self, edit: Edit) -> None:
        batches = self.batches
        if not isinstance(edit, Save | Evict):
            self.drawn.pop(edit.batch if not isinstance(edit, Move) else edit.target, None)
        match edit:
            case Create(batch, rows):
                assert batch not in batches and rows > 0
                batches[batch] = [[] for _ in range(rows)]
            case Move(target, source, rows):
                assert target != source and len(rows) == len(set(rows)) > 0
                moved = [batches[source][row] for row in rows]
                batches[source] = [row for i, row in enumerate(batches[source]) if i not in rows]
                batches.setdefault(target, []).extend(moved)
                if not batches[source]:
                    del batches[source]
            case Keep(batch, []):
                del batches[batch]
            case Keep(batch, rows):
                assert len(rows) < len(batches[batch]), "keeping every row is a wasted edit"
                batches[batch] = [batches[batch][row] for row in rows]
            case Save(batch, row, entry):
                assert entry not in self.entries
                self.entries[entry] = list(batches[batch][row])
            case Restore(batch, entry, tokens):
                assert batch not in batches and len(self.entries[entry]) >= tokens
                batches[batch] = [self.entries[entry][:tokens]]
            case Evict(entry):
                del self.entries[entry]
            case _:
                raise AssertionError(f"unknown edit {edit}")

    def forward(self, forward: Prefill | Decode) -> list[Sampled]:
        rows = self.batches[forward.batch]
        assert len(rows) == forward.rows
        if isinstance(forward, Prefill):
            for row, tokens in zip(rows, forward.tokens, strict=True):
                row += tokens
            return []
        assert not (forward.tokens and forward.ahead)
        for row, token in zip(rows, forward.tokens or self.drawn[forward.batch], strict=True):
            row.append(token)
        drawn = [next_token(row) for row in rows]
        self.drawn = {forward.batch: drawn} if forward.broadcast else {}
        return [Sampled(token) for token in drawn]


class Simulation:
    """A scheduler and its ranks. Steps run when they are published; their results come when asked for."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.ranks = FakeRanks()
        self.flights: deque[tuple[Step, list[Sampled]]] = deque()
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Finished | Rejected] = {}
        self.prompt_logprobs: dict[str, list[Logprobs | None]] = {}
        self.steps: list[Step] = []
        self.started: list[str] = []
        self._chunks: Counter[str] = Counter()

    def submit(self, request: Request) -> Rejected | None:
        self.requests[request.id] = request
        self.tokens[request.id] = list(request.generated)
        rejected = self.scheduler.submit(request)
        if rejected:
            self._hear(rejected)
        return rejected

    def cancel(self, request_id: str) -> None:
        if finished := self.scheduler.cancel(request_id):
            self._hear(finished)

    def publish(self) -> Step | None:
        step = self.scheduler.next_step()
        if step is None:
            return None
        assert step.index == len(self.steps)
        assert step.forward or (step.edits and not self.flights), "edits can wait for a step in flight"
        self.steps.append(step)
        for edit in step.edits:
            self.ranks.edit(edit)
        assert self.ranks.entry_tokens <= self.limits.prompt_cache_tokens
        drawn = self._run(step)
        assert self.ranks.tokens <= self.limits.kv_tokens
        assert self.ranks.tokens <= self.scheduler.reserved_tokens + self.scheduler.cached_tokens
        self.flights.append((step, drawn))
        self._check_flights()
        return step

    def complete(self) -> list[Event]:
        step, drawn = self.flights.popleft()
        logprobs: list[Logprobs] = []
        if isinstance(step.forward, Prefill) and step.forward.logits:
            logprobs = [Logprobs(float(target), []) for target in self.scheduler.targets(step)]
        events = self.scheduler.complete(step, drawn, logprobs)
        for event in events:
            self._hear(event)
        return events

    def turn(self) -> None:
        """Publish all that can be, then take one result."""
        while self.publish():
            pass
        if self.flights:
            self.complete()

    def drain(self) -> None:
        """Run until nothing is left to do, and check that nothing is left behind."""
        for _ in range(100_000):
            self.turn()
            if not self.flights and self.publish() is None:
                break
        assert self.scheduler.idle, "the scheduler has work but publishes no step"
        assert not self.ranks.batches, "batches were left behind"
        assert self.scheduler.reserved_tokens == self.scheduler.running == self.scheduler.waiting == 0
        assert self.scheduler.cached_tokens == self.ranks.entry_tokens
        assert self.ends.keys() == self.requests.keys()

    @property
    def decodes(self) -> list[Decode]:
        """All decodes so far."""
        return [step.forward for step in self.steps if isinstance(step.forward, Decode)]

    def check_answer(self, request_id: str) -> None:
        """The tokens are those of the request alone, or the first of them if it was cancelled."""
        request, end = self.requests[request_id], self.ends[request_id]
        assert isinstance(end, Finished)
        expected, reason = solo(request, self.limits.max_context)
        if end.reason == "cancelled":
            expected = expected[: len(self.tokens[request_id])]
        else:
            assert end.reason == reason
        assert self.tokens[request_id] == expected
        assert end.completion_tokens == len(expected)

    def _run(self, step: Step) -> list[Sampled]:
        forward = step.forward
        if forward is None:
            return []
        rows = self.scheduler.rows(step)
        self.started += [row.request.id for row in rows if row.request.id not in self.started]
        if isinstance(forward, Prefill):
            longest = max(map(len, forward.tokens))
            assert 0 < longest * len(rows) <= self.limits.prefill_chunk and min(map(len, forward.tokens)) > 0
            self._chunks.update(self._chunks.keys())
            most = max(self._chunks.values(), default=1) - 1
            assert most <= self.limits.lanes, "more chunks than stages between two tokens of a sequence"
            assert not forward.logits or len(rows) == 1
            return self.ranks.forward(forward)
        drawn = self.ranks.forward(forward)
        positions = self.scheduler.positions(step)
        for row, held, position in zip(rows, self.ranks.batches[forward.batch], positions, strict=True):
            assert held[: len(row.known())] == row.known(), f"the cache of {row.request.id} is wrong"
            assert len(held) == len(row.known()) + (forward.ahead > 0)
            assert position == len(row.generated) + (forward.ahead > 0)
            self._chunks[row.request.id] = 1
        return drawn

    def _check_flights(self) -> None:
        lanes = self.limits.lanes
        decodes = [
            step.forward.batch
            for step, _ in self.flights
            if isinstance(step.forward, Decode) and not step.forward.ahead
        ]
        prefills = sum(isinstance(step.forward, Prefill) for step, _ in self.flights)
        assert len(decodes) == len(set(decodes)) <= lanes
        assert prefills <= lanes + 1
        most = lanes + self.limits.look_ahead
        assert sum(isinstance(step.forward, Decode) for step, _ in self.flights) <= most
        assert len(self.flights) <= 2 * lanes + 2 + self.limits.look_ahead

    def _hear(self, event: Event) -> None:
        assert event.id not in self.ends, f"{event} after its end"
        if isinstance(event, Token):
            self.tokens[event.id].append(event.token)
        elif isinstance(event, PromptLogprobs):
            assert not self.tokens[event.id] and event.id not in self.prompt_logprobs
            self.prompt_logprobs[event.id] = list(event.logprobs)
        else:
            self.ends[event.id] = event
            del self._chunks[event.id]
