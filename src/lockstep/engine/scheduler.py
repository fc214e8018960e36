"""Decides, on rank 0, which step comes next. Pure: no clock, no I/O, no tensors; same calls, same steps.

A request waits, is prefilled, alone or with others, decodes in a lane and is finished. The scheduler's
picture of the caches runs ahead of the device: it is what they will hold once all published steps have
run. Prefill needs no results, so it can run ahead; a decode needs the last tokens of its own lane only, which
rank 0 need not have read where every rank has them.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from typing import NamedTuple

from lockstep.engine.lanes import Lane, Lanes
from lockstep.engine.limits import Limits
from lockstep.engine.memory import Memory
from lockstep.engine.mirror import Mirror
from lockstep.engine.prefill import Prefills
from lockstep.engine.queue import Queue
from lockstep.engine.request import Event, Finished, Logprobs, Rejected, Request, Sampled
from lockstep.engine.sequence import Roster, Sequence
from lockstep.engine.step import Decode, Forward, Prefill, Step


class _Work(NamedTuple):
    """What a step computes: its sequences in row order, the lane that waits for a decode, the positions of
    the tokens that this draws, and that of a prefill's first token."""

    forward: Forward | None = None
    rows: Sequenced[Sequence] = ()
    lane: Lane | None = None
    positions: Sequenced[int] = ()
    start: int = 0


class Scheduler:
    """Requests in, steps out, results in, events out."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._sequences: dict[str, Sequence] = {}
        self._waiting = Queue()
        self._mirror = Mirror()
        self._memory = Memory(limits, self._mirror)
        self._lanes = Lanes(limits.lanes, limits.batchable, self._mirror)
        self._prefills = Prefills(limits, self._waiting, self._memory, self._mirror, self._lanes)
        self._left: list[Roster] = []
        self._flights: dict[int, _Work] = {}
        self._steps = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing under way."""
        return not (self._sequences or self._flights or self._mirror.edited or self._left)

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being prefilled or decoded."""
        return len(self._sequences) - len(self._waiting)

    @property
    def reserved_tokens(self) -> int:
        """KV tokens set aside for running requests."""
        return self._memory.reserved

    @property
    def cached_tokens(self) -> int:
        """KV tokens in prefix caches."""
        return self._memory.cached

    def submit(self, request: Request) -> Rejected | None:
        """Put a request in the queue, or say why not."""
        limits = self.limits
        if refusal := limits.refusal(request):
            return Rejected(id=request.id, reason=refusal, retry=False, code="context_length_exceeded")
        if request.id in self._sequences:
            return Rejected(id=request.id, reason=f"request {request.id} is already here", retry=False)
        if len(self._sequences) >= limits.most_requests:
            reason = f"{self.running} requests are running and {self.waiting} are waiting; try again later"
            return Rejected(id=request.id, reason=reason, retry=True)
        sequence = Sequence(request, limits.allowed_tokens(request))
        self._sequences[request.id] = sequence
        self._waiting.push(sequence)
        return None

    def cancel(self, request_id: str) -> Finished | None:
        """End a request now; its row leaves with the next step. None if it is not here any more."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        if sequence.roster is None:
            self._waiting.remove(sequence)
        return self._finish(sequence, "cancelled")

    def is_waiting(self, request_id: str) -> bool:
        """Whether this request is here and has not started."""
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.roster is None

    def forget(self) -> None:
        """Cancel every request: nobody waits for any of them."""
        for request_id in list(self._sequences):
            self.cancel(request_id)

    def next_step(self) -> Step | None:
        """The step to publish now; None until a step in flight completes or a request comes."""
        self._drop_finished()
        self._prefills.end()
        work = self._decode()
        if work is None and self._prefills.due and self._may_prefill():
            self._prefills.admit(len(self._sequences))
            work = self._decode() or self._prefill()
        work = work or self._decode_ahead()
        if work is None and (self._flights or not self._mirror.edited):
            return None
        return self._publish(work or _Work())

    def rows(self, step: Step) -> Sequenced[Sequence]:
        """The sequences in the rows of a step in flight: `sampling`, `prompt`, `generated`."""
        return self._flights[step.index].rows

    def positions(self, step: Step) -> Sequenced[int]:
        """For each row of a decode in flight, how many tokens were generated before the one that it draws."""
        return self._flights[step.index].positions

    def targets(self, step: Step) -> list[int]:
        """The prompt tokens that the logits of a prefill in flight predict, one per position."""
        work = self._flights[step.index]
        assert isinstance(work.forward, Prefill) and work.forward.logits, "only prefills with logits predict"
        first = work.start + 1
        return work.rows[0].request.prompt[first : first + len(work.forward.tokens[0])]

    def complete(
        self, step: Step, sampled: Sequenced[Sampled] = (), prompt_logprobs: Sequenced[Logprobs] = ()
    ) -> list[Event]:
        """Take the results of the oldest step in flight, and say what became of its requests.

        A decode has one `sampled` per row, a prefill with logits one `prompt_logprobs` per target.
        """
        oldest = next(iter(self._flights))
        assert step.index == oldest, f"step {step.index} completed, but {oldest} is the oldest in flight"
        work = self._flights.pop(oldest)
        if work.lane is not None:
            work.lane.decodes -= 1
        if isinstance(work.forward, Prefill) and work.forward.logits:
            work.rows[0].prompt_logprobs += prompt_logprobs
        if not isinstance(work.forward, Decode):
            return []
        events: list[Event] = []
        for sequence, drawn in zip(work.rows, sampled, strict=True):
            if sequence.finished:
                continue
            told, reason = sequence.accept(drawn)
            events += told
            if reason:
                events.append(self._finish(sequence, reason))
                self._memory.save(sequence)
        return events

    def _finish(self, sequence: Sequence, reason: str) -> Finished:
        """Forget a sequence; its memory counts as free at once."""
        del self._sequences[sequence.request.id]
        if sequence.roster is not None:
            self._memory.give_back(sequence)
            if sequence.roster not in self._left:
                self._left.append(sequence.roster)
        return sequence.finish(reason)

    def _drop_finished(self) -> None:
        for roster in self._left:
            self._mirror.drop_finished(roster)
        if self._left:
            self._lanes.drop_empty()
            self._prefills.drop_empty()
            self._left = []

    def _decode(self) -> _Work | None:
        """One token for each row of the lane whose turn it is."""
        lane = self._lanes.next()
        return self._take_turn(lane, ahead=False) if lane else None

    def _decode_ahead(self) -> _Work | None:
        """One token more for the rows of a decode in flight, if it is the only one and its rows stay."""
        lane = self._lanes.sole if self.limits.look_ahead else None
        if lane is None or lane.roster is None or lane.decodes != 1:
            return None
        flight = next(work for work in self._flights.values() if work.lane is lane)
        assert isinstance(flight.forward, Decode)
        if not flight.forward.broadcast or flight.rows is not lane.roster.rows:
            return None
        return self._take_turn(lane, ahead=True)

    def _take_turn(self, lane: Lane, ahead: bool) -> _Work:
        """The lane's next decode, with tokens that rank 0 has read or, `ahead`, not."""
        assert lane.roster is not None
        rows = lane.roster.rows
        lane.decodes, lane.chunks = lane.decodes + 1, 0
        for sequence in rows:
            sequence.cached += 1
        tokens = [] if ahead else [sequence.last for sequence in rows]
        argmax = all(sequence.sampling.is_argmax for sequence in rows)
        broadcast = self.limits.look_ahead and all(sequence.may_go_ahead for sequence in rows)
        decode = Decode(lane.roster.batch, tokens, argmax, broadcast, len(rows) if ahead else 0)
        return _Work(decode, rows, lane, [sequence.drawing for sequence in rows])

    def _may_prefill(self) -> bool:
        """As many chunks as stages between two decodes of a sequence; one more in flight."""
        chunks = sum(isinstance(work.forward, Prefill) for work in self._flights.values())
        return chunks <= self.limits.lanes and self._lanes.may_prefill

    def _prefill(self) -> _Work | None:
        chunk = self._prefills.next()
        return _Work(chunk.forward, chunk.rows, start=chunk.start) if chunk else None

    def _publish(self, work: _Work) -> Step:
        step = Step(self._steps, self._mirror.take_edits(), work.forward)
        self._steps += 1
        self._flights[step.index] = work
        return step
