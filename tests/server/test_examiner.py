"""The process that tries a grammar out: whatever it is asked, the answer comes in time."""

from __future__ import annotations

import asyncio
import time

import pytest

from lockstep.engine.grammar import json_grammar, lark_grammar
from lockstep.server import examiner
from lockstep.server.errors import ApiError
from lockstep.server.examine import Question

VOCABULARY = 330


def refusal(folder, *grammars, vocab_size=VOCABULARY):
    async def ask():
        asked = examiner.Examiner()
        return [await asked.refusal(Question(g, str(folder), vocab_size, [1])) for g in grammars]

    return asyncio.run(ask())


def chain(links):
    """Each definition refers to the next one."""
    definitions = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(links)}
    return {"$defs": definitions | {f"a{links}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


def test_a_usual_schema_can_be_followed(folder):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    assert refusal(folder, json_grammar(schema), lark_grammar(['start: "a" | "b"'])) == ["", ""]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"properties": 3}, "must be an object"),
        ({"not": {}}, "not"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "fuel exhausted"),
        ({"$ref": "#"}, "too complex"),
        ({"enum": ["x" * 70_000]}, "at most 64000"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_schema_that_cannot_be_followed_is_refused(folder, schema, reason):
    (said,) = refusal(folder, json_grammar(schema))
    assert reason in said


def test_a_schema_that_crashes_the_compiler_crashes_nothing_else(folder, monkeypatch):
    monkeypatch.setattr(examiner, "LONGEST", 10**6)
    assert refusal(folder, json_grammar(chain(20_000))) == ["it is too complex to be compiled"]


def test_a_schema_that_takes_long_to_compile_is_given_up(folder):
    slow = {"type": "integer", "multipleOf": 999_983}  # 10 s
    began_s = time.monotonic()
    assert refusal(folder, json_grammar(slow)) == ["it is too complex to be compiled"]
    assert time.monotonic() - began_s < examiner.DEADLINE_S


def test_a_tokenizer_that_llguidance_does_not_know_is_told(folder, tmp_path):
    grammar = json_grammar({"type": "integer"})
    assert "too small" in refusal(folder, grammar, vocab_size=100)[0]
    assert "No such file" in refusal(tmp_path, grammar)[0]


def scripted(monkeypatch, *told):
    """What is asked of the process, which says these one after the other."""
    asked, answers = [], iter(told)

    async def ask(question):
        asked.append(question.grammar)
        return next(answers)

    monkeypatch.setattr(examiner, "_ask", ask)
    return asked


def test_an_answer_is_remembered(folder, monkeypatch):
    asked = scripted(monkeypatch, *[("no", True)] * 4)
    monkeypatch.setattr(examiner, "REMEMBERED", 2)
    assert refusal(folder, "a", "b", "a", "c", "a") == ["no"] * 5
    assert asked == ["a", "b", "c", "a"]


def test_a_process_that_was_held_up_is_asked_again(folder, monkeypatch):
    asked = scripted(monkeypatch, ("it takes more than 15 s to compile", False), ("", True))
    assert refusal(folder, "a", "a", "a") == ["it takes more than 15 s to compile", "", ""]
    assert asked == ["a", "a"]


def test_what_is_known_is_told_while_another_schema_is_tried_and_others_do_not_wait_for_ever(
    folder, monkeypatch
):
    monkeypatch.setattr(examiner, "DEADLINE_S", 0.2)

    async def ask(question):
        await asyncio.sleep(60 if question.grammar == "slow" else 0)
        return "no", True

    async def life():
        asked = examiner.Examiner()
        questions = {g: Question(g, str(folder), VOCABULARY, [1]) for g in ("known", "slow", "new")}
        await asked.refusal(questions["known"])
        slow = asyncio.create_task(asked.refusal(questions["slow"]))
        await asyncio.sleep(0)
        assert await asked.refusal(questions["known"]) == "no"
        with pytest.raises(ApiError, match="Other schemas") as refused:
            await asked.refusal(questions["new"])
        assert refused.value.status == 503
        slow.cancel()

    monkeypatch.setattr(examiner, "_ask", ask)
    asyncio.run(life())
