"""The scheduler against ranks that keep their caches as lists of tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_ranks import Simulation, solo
from lockstep.engine.limits import Limits
from lockstep.engine.queue import PATIENCE
from lockstep.engine.request import Finished, PromptLogprobs, Rejected, Request, Sampling, Token
from lockstep.engine.step import Create, Decode, Evict, Keep, Move, Prefill, Restore, Save

ROOMY: dict[str, Any] = {"kv_tokens": 100_000, "max_context": 10_000}


def ask(name: object, prompt: int | list[int] = 5, max_tokens: int = 4, **more: Any) -> Request:
    """A request; a number stands for a prompt of that many equal tokens."""
    tokens = prompt if isinstance(prompt, list) else [1000 + sum(map(ord, str(name)))] * prompt
    return Request(id=str(name), prompt=tokens, max_tokens=max_tokens, **more)


def run(limits: Limits, *requests: Request) -> Simulation:
    simulation = Simulation(limits)
    for request in requests:
        assert simulation.submit(request) is None
    simulation.drain()
    for request in requests:
        simulation.check_answer(request.id)
    return simulation


LIMITS = st.builds(
    Limits,
    lanes=st.integers(1, 4),
    kv_tokens=st.integers(150, 1200),
    max_context=st.just(140),
    max_rows=st.integers(1, 5),
    max_queue=st.integers(0, 10),
    prefill_chunk=st.integers(1, 64),
    prefill_rows=st.integers(1, 4),
    prompt_cache_tokens=st.sampled_from([0, 100, 400]),
    trimmable=st.booleans(),
    batchable=st.booleans(),
    look_ahead=st.booleans(),
).map(lambda limits: replace(limits, look_ahead=limits.look_ahead and limits.lanes == 1))


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Prompts of 1 to 130 tokens that often share a prefix."""
    base = [draw(st.integers(0, 2))] * 200
    return base[: draw(st.integers(0, 100))] + draw(st.lists(st.integers(0, 2), min_size=1, max_size=30))


REQUESTS = st.builds(
    Request,
    id=st.just(""),
    prompt=prompts(),
    max_tokens=st.integers(0, 12),
    stop_tokens=st.sampled_from([[], [1, 2, 3, 4]]),
    priority=st.integers(-1, 1),
    prompt_logprobs=st.sampled_from([False, False, False, True]),
)
ACTIONS = st.lists(
    st.one_of(
        REQUESTS,
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.sampled_from(["publish", "publish", "complete", "turn", "turn"]),
    ),
    max_size=80,
)


def act(simulation: Simulation, actions: list[Any]) -> None:
    for action in actions:
        match action:
            case Request():
                name = str(len(simulation.requests))
                simulation.submit(Request(**{**fields(action), "id": name}))
            case ("cancel", number):
                simulation.cancel(str(number))
            case "publish":
                simulation.publish()
            case "complete" if simulation.flights:
                simulation.complete()
            case "turn":
                simulation.turn()


def fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


@settings(max_examples=300, deadline=None)
@given(LIMITS, ACTIONS)
def test_whatever_comes_and_goes_every_request_gets_its_own_answer_and_nothing_is_left(
    limits: Limits, actions: list[Any]
):
    simulation = Simulation(limits)
    act(simulation, actions)
    simulation.drain()
    for name, end in simulation.ends.items():
        request = simulation.requests[name]
        if isinstance(end, Rejected):
            continue
        simulation.check_answer(name)
        if request.prompt_logprobs and end.reason != "cancelled":
            told = simulation.prompt_logprobs[name]
            assert [entry and entry.token for entry in told] == [None, *map(float, request.prompt[1:])]


@pytest.mark.parametrize("seed", range(100))
def test_a_busy_day_leaves_nothing_behind(seed: int):
    dice = random.Random(seed)
    limits = Limits(
        lanes=dice.randint(1, 4),
        kv_tokens=dice.choice([150, 400, 3000]),
        max_context=140,
        max_rows=dice.randint(1, 6),
        max_queue=dice.choice([0, 5, 50]),
        prefill_chunk=dice.choice([1, 7, 32, 128]),
        prefill_rows=dice.randint(1, 5),
        prompt_cache_tokens=dice.choice([0, 100, 1000]),
        trimmable=dice.choice([True, False]),
        batchable=dice.random() < 0.75,
    )
    limits = replace(limits, look_ahead=limits.lanes == 1 and dice.random() < 0.75)
    simulation = Simulation(limits)
    arrivals, cancels, depth = dice.choice([0.05, 0.3]), dice.choice([0, 0.1]), dice.choice([0.3, 0.9])
    for _ in range(300):
        draw = dice.random()
        if draw < arrivals:
            tail = [dice.randint(0, 2) for _ in range(dice.randint(1, 40))]
            prompt = [dice.randint(0, 2)] * dice.choice([0, 0, 20, 40, 90]) + tail
            logprobs = dice.random() < 0.1
            name = len(simulation.requests)
            simulation.submit(ask(name, prompt, dice.randint(0, 30), prompt_logprobs=logprobs))
        elif draw < arrivals + cancels:
            simulation.cancel(str(dice.randrange(len(simulation.requests) + 1)))
        elif dice.random() < depth or not simulation.flights:
            simulation.publish()
        else:
            simulation.complete()
    simulation.drain()
    for name, end in simulation.ends.items():
        if isinstance(end, Finished):
            simulation.check_answer(name)


@settings(max_examples=60, deadline=None)
@given(LIMITS, ACTIONS, st.integers(0, 60))
def test_requests_that_a_restart_interrupts_end_with_the_same_tokens(
    limits: Limits, actions: list[Any], fall: int
):
    before = Simulation(limits)
    act(before, actions[:fall])
    after = Simulation(limits)
    for name, request in before.requests.items():
        if name not in before.ends:
            again = Request(**{**fields(request), "generated": before.tokens[name]})
            assert after.submit(again) is None, "what fitted before the restart must fit after it"
    after.drain()
    for name in after.requests:
        after.check_answer(name)
        assert after.tokens[name] == solo(before.requests[name], limits.max_context)[0]


@settings(max_examples=40, deadline=None)
@given(LIMITS, ACTIONS)
def test_the_same_calls_give_the_same_steps(limits: Limits, actions: list[Any]):
    first, second = Simulation(limits), Simulation(limits)
    for simulation in (first, second):
        act(simulation, actions)
        simulation.drain()
    assert first.steps == second.steps


AHEAD: dict[str, Any] = {**ROOMY, "lanes": 1, "look_ahead": True}


def test_decodes_go_ahead_between_the_first_token_and_the_last():
    simulation = run(Limits(**AHEAD), ask("a", max_tokens=5))
    assert [(len(d.tokens), d.ahead, d.broadcast) for d in simulation.decodes] == [
        (1, 0, False),
        (1, 0, True),
        (0, 1, True),
        (0, 1, True),
        (0, 1, False),
    ]


def test_no_decode_goes_ahead_of_a_text_that_its_token_depends_on():
    for sampling in (
        Sampling(frequency_penalty=0.5),
        Sampling(repetition_penalty=1.1),
        Sampling(grammar="{}"),
    ):
        simulation = run(Limits(**AHEAD), ask("a"), ask("b", sampling=sampling))
        assert not any(decode.broadcast for decode in simulation.decodes if decode.rows == 2)
    simulation = run(Limits(**AHEAD), ask("a", sampling=Sampling(temperature=1.0, logit_bias={5: 1.0})))
    assert any(decode.ahead for decode in simulation.decodes)


def test_a_prompt_is_read_before_decodes_go_ahead():
    simulation = Simulation(Limits(**AHEAD))
    simulation.submit(ask("a", max_tokens=100))
    for _ in range(5):
        simulation.turn()
    simulation.submit(ask("b", max_tokens=100))
    begun = len(simulation.steps)
    simulation.turn()
    assert [type(step.forward) for step in simulation.steps[begun:]] == [Prefill]
    for _ in range(2):
        simulation.turn()
    assert simulation.decodes[-1].rows == 2


def test_the_stop_token_is_saved_where_a_decode_went_ahead_with_it():
    prompt = [1] * 40
    said, _ = solo(ask("a", prompt, max_tokens=100), 10_000)
    end = next(place for place in range(35, 100) if said[place] not in said[:place])
    limits = Limits(**AHEAD, prompt_cache_tokens=1000, trimmable=False)
    simulation = run(limits, ask("a", prompt, max_tokens=100, stop_tokens=[said[end]]))
    assert simulation.decodes[-1].ahead == 1
    assert prompt + said[: end + 1] in simulation.ranks.entries.values()


@settings(max_examples=100, deadline=None)
@given(lanes=st.integers(1, 4), count=st.integers(1, 20), gone=st.sets(st.integers(0, 19)))
def test_sequences_are_spread_evenly_again_after_some_have_left(lanes: int, count: int, gone: set[int]):
    simulation = Simulation(Limits(lanes=lanes, **ROOMY))
    for name in range(count):
        simulation.submit(ask(name, max_tokens=1000))
    for _ in range(20 * lanes):
        simulation.turn()
    for name in gone:
        simulation.cancel(str(name))
    for _ in range(4 * lanes):
        simulation.turn()
    left = count - len(gone & set(range(count)))
    used = min(lanes, left)
    sizes = [decode.rows for decode in simulation.decodes[-used:]] if used else []
    assert sum(sizes) == left
    assert not sizes or max(sizes) - min(sizes) <= 1
    before = len(simulation.steps)
    for _ in range(4 * lanes):
        simulation.turn()
    assert not any(step.edits for step in simulation.steps[before:]), "an even spread stays as it is"


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_long_prompt_goes_out_in_chunks_as_many_as_stages_between_two_decodes_of_a_lane(lanes: int):
    simulation = Simulation(Limits(lanes=lanes, prefill_chunk=10, **ROOMY))
    for name in range(2 * lanes):
        simulation.submit(ask(name, max_tokens=200))
    for _ in range(10 * lanes):
        simulation.turn()
    before = len(simulation.steps)
    simulation.submit(ask("long", 101))
    for _ in range(40 * lanes):
        simulation.turn()
    kinds = "".join("P" if isinstance(step.forward, Prefill) else "D" for step in simulation.steps[before:])
    assert kinds.count("P") == 10
    assert "P" * lanes in kinds and "P" * (lanes + 1) not in kinds
    assert kinds.strip("D").count("D") <= 10 * lanes, "no round of decodes goes without its chunk"


@pytest.mark.parametrize("moment", range(12))
def test_a_row_that_changes_lanes_does_not_wait_for_a_second_chunk(moment: int):
    simulation = Simulation(Limits(lanes=2, prefill_chunk=5, **ROOMY))
    for name in range(6):
        simulation.submit(ask(name, max_tokens=200))
    for _ in range(20):
        simulation.turn()
    simulation.submit(ask("long", 300))
    for _ in range(6 + moment // 2):
        simulation.turn()
    if moment % 2:
        simulation.publish()
    newest = [step for step, _ in simulation.flights if isinstance(step.forward, Decode)][-1]
    before = len(simulation.steps)
    for row in list(simulation.scheduler.rows(newest))[:2]:
        simulation.cancel(row.request.id)
    for _ in range(20):
        simulation.turn()
    edits = [edit for step in simulation.steps[before:] for edit in step.edits]
    assert any(isinstance(edit, Move) for edit in edits), "a row has to change lanes for this test"


def test_chunks_follow_each_other_at_once_when_nothing_decodes():
    simulation = Simulation(Limits(lanes=2, prefill_chunk=10, **ROOMY))
    simulation.submit(ask("long", 51))
    published = [simulation.publish() for _ in range(4)]
    assert [step.forward.batch for step in published if step] == [0, 0, 0], "stages + 1 are in flight"
    simulation.complete()
    assert simulation.publish()
    simulation.drain()


def chunk_sizes(simulation: Simulation) -> list[int]:
    steps = (step.forward for step in simulation.steps)
    return [len(forward.tokens[0]) for forward in steps if isinstance(forward, Prefill)]


def test_a_prompt_alone_is_cut_so_that_every_stage_has_a_part_of_it():
    limits = [Limits(lanes=lanes, **ROOMY) for lanes in (1, 2, 3)]
    sizes = [chunk_sizes(run(each, ask("long", 721))) for each in limits]
    assert sizes == [[512, 208], [180, 135, 135, 135, 135], [120] * 6]


def test_prompts_that_wait_fill_the_stages_and_are_not_cut_for_that():
    simulation = run(Limits(lanes=2, **ROOMY), ask("first", 513), ask("second", 513))
    assert chunk_sizes(simulation)[0] == 512


def test_short_prompts_are_prefilled_together_a_batch_for_each_lane():
    simulation = run(Limits(lanes=2, **ROOMY), *(ask(name, 5 + name) for name in range(8)))
    prefills = [step.forward for step in simulation.steps if isinstance(step.forward, Prefill)]
    assert [len(prefill.tokens) for prefill in prefills] == [4, 4]


def test_one_request_alone_needs_no_edit_but_its_beginning_and_end():
    simulation = run(Limits(lanes=3, **ROOMY), ask("a", 5))
    edits = [edit for step in simulation.steps for edit in step.edits]
    assert edits == [Create(0, 1), Keep(0, [])]


def test_a_lane_that_fell_empty_takes_the_next_request_without_a_copy():
    simulation = run(Limits(lanes=1, max_rows=1, **ROOMY), ask("a"), ask("b"))
    assert not any(isinstance(edit, Move) for step in simulation.steps for edit in step.edits)


def test_a_prompt_of_one_token_decodes_without_a_prefill():
    simulation = run(Limits(lanes=2, **ROOMY), ask("a", 1), ask("b", 1), ask("c", 5))
    assert sum(isinstance(step.forward, Prefill) for step in simulation.steps) == 1


def test_sequences_that_cannot_share_a_batch_take_turns():
    limits = Limits(lanes=2, max_rows=5, batchable=False, **ROOMY)
    simulation = run(limits, *(ask(name, max_tokens=10) for name in range(7)))
    assert all(len(decode.tokens) == 1 for decode in simulation.decodes)
    assert not any(isinstance(edit, Move) for step in simulation.steps for edit in step.edits)
    order = [decode.batch for decode in simulation.decodes]
    middle = order[15:25]
    assert middle[:5] == middle[5:] and len(set(middle[:5])) == 5


def test_a_cancelled_sequence_leaves_with_the_very_next_step():
    simulation = Simulation(Limits(lanes=2, **ROOMY))
    for name in range(4):
        simulation.submit(ask(name, max_tokens=100))
    for _ in range(12):
        simulation.turn()
    while simulation.publish():
        pass
    used = simulation.scheduler.reserved_tokens
    simulation.cancel("0")
    assert simulation.scheduler.reserved_tokens < used
    simulation.complete()
    step = simulation.publish()
    assert step and any(isinstance(edit, Keep) for edit in step.edits)
    assert sum(map(len, simulation.ranks.batches.values())) == 3


def test_a_prompt_cancelled_between_two_chunks_is_dropped():
    simulation = Simulation(Limits(lanes=1, prefill_chunk=10, **ROOMY))
    simulation.submit(ask("long", 100))
    simulation.publish()
    simulation.cancel("long")
    simulation.drain()
    assert simulation.ends["long"] == Finished(
        id="long", reason="cancelled", prompt_tokens=100, completion_tokens=0, cached_tokens=0
    )
    assert sum(isinstance(step.forward, Prefill) for step in simulation.steps) == 1


def test_cancelling_twice_or_a_stranger_does_nothing():
    simulation = Simulation(Limits(lanes=1, **ROOMY))
    simulation.submit(ask("a"))
    simulation.cancel("b")
    simulation.cancel("a")
    simulation.cancel("a")
    simulation.drain()


def test_forgetting_all_requests_frees_all_they_held():
    simulation = Simulation(Limits(lanes=2, max_rows=1, prefill_chunk=10, **ROOMY))
    for name in range(4):
        simulation.submit(ask(name, 25))
    for _ in range(4):
        simulation.turn()
    simulation.scheduler.forget()
    while simulation.flights or simulation.publish():
        simulation.turn()
    assert simulation.scheduler.idle and not simulation.ranks.batches
    assert simulation.scheduler.reserved_tokens == 0


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    simulation = Simulation(Limits(lanes=1, kv_tokens=100, max_context=200))
    memory = simulation.submit(ask("a", 60, max_tokens=50))
    assert memory and not memory.retry
    assert all(number in memory.reason for number in ("60", "50", "110", "100"))
    context = simulation.submit(ask("b", 200))
    assert context and not context.retry and "200" in context.reason and "199" in context.reason
    empty = simulation.submit(ask("c", []))
    assert empty and not empty.retry


def test_max_tokens_is_cut_to_what_the_context_leaves():
    simulation = Simulation(Limits(lanes=1, kv_tokens=100, max_context=20))
    simulation.submit(ask("a", 15, max_tokens=1000))
    simulation.drain()
    assert len(simulation.tokens["a"]) == 5
    assert simulation.ends["a"].reason == "length"


def test_a_full_queue_refuses_for_now_but_takes_back_what_a_restart_brings():
    limits = Limits(lanes=1, max_rows=2, max_queue=3, **ROOMY)
    simulation = Simulation(limits)
    for name in range(5):
        assert simulation.submit(ask(name, max_tokens=50)) is None
    refused = simulation.submit(ask(5))
    assert refused and refused.retry
    simulation.drain()


def test_two_requests_with_one_id_are_not_mixed_up():
    simulation = Simulation(Limits(lanes=1, **ROOMY))
    simulation.submit(ask("a"))
    again = simulation.scheduler.submit(ask("a"))
    assert again and not again.retry
    simulation.drain()


def test_a_big_request_is_not_overtaken_by_small_ones_that_would_fit():
    simulation = Simulation(Limits(lanes=1, kv_tokens=100, max_context=100))
    simulation.submit(ask("first", 20, max_tokens=20))
    simulation.submit(ask("big", 60, max_tokens=30))
    for name in range(5):
        simulation.submit(ask(name, 5, max_tokens=5))
    simulation.drain()
    assert simulation.started == ["first", "big", "0", "1", "2", "3", "4"]


def test_first_come_is_first_served_within_a_priority():
    simulation = Simulation(Limits(lanes=2, max_rows=1, **ROOMY))
    for name in range(12):
        simulation.submit(ask(name, 5, priority=name % 2))
    simulation.drain()
    started = [int(name) for name in simulation.started]
    assert started == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]


def test_better_priorities_cannot_starve_a_request():
    simulation = Simulation(Limits(lanes=1, max_rows=1, max_queue=1000, **ROOMY))
    simulation.submit(ask("running", max_tokens=2))
    simulation.publish()
    simulation.submit(ask("patient", max_tokens=1, priority=1))
    for name in range(2 * PATIENCE):
        simulation.submit(ask(name, max_tokens=1))
    simulation.drain()
    assert PATIENCE - 2 <= simulation.started.index("patient") <= PATIENCE + 2


def test_a_prompt_that_was_seen_before_is_not_prefilled_again():
    prompt = list(range(100))
    simulation = Simulation(Limits(lanes=2, prompt_cache_tokens=1000, **ROOMY))
    simulation.submit(ask("a", prompt))
    simulation.drain()
    before = len(simulation.steps)
    simulation.submit(ask("b", [*prompt[:80], 7, 7, 7]))
    simulation.drain()
    assert simulation.ends["b"].cached_tokens == 80
    prefills = [step.forward for step in simulation.steps[before:] if isinstance(step.forward, Prefill)]
    assert [prefill.tokens for prefill in prefills] == [[[7, 7]]]
    simulation.check_answer("b")


def test_a_conversation_goes_on_from_its_last_answer():
    simulation = Simulation(Limits(lanes=1, prompt_cache_tokens=1000, **ROOMY))
    simulation.submit(ask("a", list(range(50)), max_tokens=40))
    simulation.drain()
    simulation.submit(ask("b", [*range(50), *simulation.tokens["a"], 1, 2, 3]))
    simulation.drain()
    assert simulation.ends["b"].cached_tokens == 89, "all but the last token, which was never an input"
    assert simulation.scheduler.cached_tokens == 89, "the answer's entry replaced the prompt's"


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_prefix_that_many_ask_for_at_once_is_prefilled_once(lanes: int):
    shared = list(range(64))
    limits = Limits(lanes=lanes, prompt_cache_tokens=10_000, **ROOMY)
    simulation = run(limits, *(ask(name, [*shared, 100 + name, 5]) for name in range(10)))
    prefills = [step.forward for step in simulation.steps if isinstance(step.forward, Prefill)]
    assert sum(len(row) for prefill in prefills for row in prefill.tokens) == 64 + 10


@pytest.mark.parametrize("lanes", [1, 3])
def test_many_samples_of_one_prompt_prefill_it_once_even_if_caches_cannot_be_cut(lanes: int):
    prompt = list(range(64))
    limits = Limits(lanes=lanes, prompt_cache_tokens=10_000, trimmable=False, **ROOMY)
    simulation = run(limits, *(ask(name, prompt) for name in range(5)))
    assert sum(isinstance(step.forward, Prefill) for step in simulation.steps) == 1


def test_prefix_caches_make_room_for_requests():
    limits = Limits(lanes=1, kv_tokens=200, max_context=200, prompt_cache_tokens=150)
    simulation = run(limits, ask("a", 100), ask("b", 150, max_tokens=50))
    assert simulation.scheduler.cached_tokens <= 150


def test_an_entry_is_restored_before_it_makes_room_for_the_request_that_uses_it():
    limits = Limits(lanes=1, kv_tokens=200, max_context=200, prompt_cache_tokens=150)
    simulation = Simulation(limits)
    simulation.submit(ask("a", [3] * 120))
    simulation.drain()
    simulation.submit(ask("b", [3] * 120 + [4], max_tokens=70))
    simulation.drain()
    assert simulation.ends["b"].cached_tokens == 120
    simulation.check_answer("b")


def test_the_entry_in_use_is_the_last_to_make_room():
    limits = Limits(lanes=1, kv_tokens=300, max_context=300, prompt_cache_tokens=300)
    simulation = run(limits, ask("a", [3] * 100, max_tokens=1), ask("b", [4] * 100, max_tokens=1))
    simulation.submit(ask("c", [3] * 100 + [5], max_tokens=50))
    step = simulation.publish()
    assert step and step.edits == [Restore(1, 0, 100), Evict(1)]
    simulation.drain()


def test_prompt_logprobs_are_not_told_again_after_a_restart():
    simulation = Simulation(Limits(lanes=1, **ROOMY))
    request = ask("a", 5, prompt_logprobs=True)
    told = solo(request, 10_000)[0][:2]
    simulation.submit(Request(**{**fields(request), "generated": told}))
    simulation.drain()
    assert not simulation.prompt_logprobs
    assert not any(isinstance(s.forward, Prefill) and s.forward.logits for s in simulation.steps)
    simulation.check_answer("a")


def test_prompt_logprobs_come_before_the_first_token_and_need_all_logits():
    prompt = list(range(40))
    limits = Limits(lanes=2, prefill_chunk=16, prompt_cache_tokens=1000, **ROOMY)
    simulation = run(limits, ask("a", prompt))
    before = len(simulation.steps)
    simulation.submit(ask("b", prompt, prompt_logprobs=True))
    simulation.drain()
    prefills = [step.forward for step in simulation.steps[before:] if isinstance(step.forward, Prefill)]
    assert all(prefill.logits for prefill in prefills)
    assert [len(prefill.tokens[0]) for prefill in prefills] == [16, 16, 7]
    assert [entry and entry.token for entry in simulation.prompt_logprobs["b"]] == [None, *range(1, 40)]


def test_a_request_for_no_tokens_yields_its_prompt_logprobs_and_no_token():
    simulation = Simulation(Limits(lanes=1, **ROOMY))
    simulation.submit(ask("a", 5, max_tokens=0, prompt_logprobs=True))
    events = []
    while simulation.publish():
        pass
    while simulation.flights:
        events += simulation.complete()
        simulation.publish()
    assert [type(event) for event in events] == [PromptLogprobs, Finished]
    assert not any(isinstance(event, Token) for event in events)


def test_an_idle_scheduler_publishes_nothing():
    simulation = Simulation(Limits(lanes=2, **ROOMY))
    assert simulation.publish() is None and simulation.scheduler.idle
    simulation.submit(ask("a"))
    assert not simulation.scheduler.idle
    simulation.drain()
    assert simulation.publish() is None


def test_results_must_come_in_the_order_of_the_steps():
    simulation = Simulation(Limits(lanes=2, prefill_chunk=4, **ROOMY))
    simulation.submit(ask("a", 20))
    simulation.publish()
    second = simulation.publish()
    assert second
    with pytest.raises(AssertionError, match="step 1 completed, but 0 is the oldest"):
        simulation.scheduler.complete(second)


def test_nothing_is_saved_when_the_prompt_cache_is_off():
    simulation = run(Limits(lanes=1, **ROOMY), ask("a", 100), ask("b", 100))
    kinds = {type(edit) for step in simulation.steps for edit in step.edits}
    assert not kinds & {Save, Restore}
    assert isinstance(simulation.steps[-1].forward, Decode | None)
