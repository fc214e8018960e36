from __future__ import annotations

import json
import logging

import pytest

from lockstep.observe.inference_log import RequestRecord
from lockstep.observe.logging import FIELDS, JsonFormatter, TextFormatter


def record(message="hello", **fields):
    made = logging.LogRecord("lockstep.x", logging.INFO, __file__, 1, message, (), None)
    setattr(made, FIELDS, fields)
    return made


def test_a_json_line_holds_the_fields_and_is_one_line():
    line = JsonFormatter().format(record("two\nlines", id="a", ttft_s=0.25))
    assert "\n" not in line
    assert json.loads(line) | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "lockstep.x",
        "message": "two\nlines",
        "id": "a",
        "ttft_s": 0.25,
    }


def test_a_text_line_quotes_what_could_be_mistaken():
    line = TextFormatter().format(record(id="a", error='has "quotes"\nand lines', empty=""))
    assert line.endswith(r'INFO hello id=a error="has \"quotes\"\nand lines" empty=""')


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x7f", "\u202e", "\u2028", "\ud800"])
def test_what_cannot_be_printed_is_escaped(caplog, character):
    assert character not in TextFormatter().format(record(error=f"a{character}b"))
    with caplog.at_level(logging.INFO):
        RequestRecord("id-1", "GET", f"/{character}2026-01-31 12:00:00 INFO forged", status=404).write()
    line = TextFormatter().format(caplog.records[0])
    assert line.isprintable()
    assert 'GET "/\\' in line


def test_a_request_is_one_line_without_its_text(caplog):
    with caplog.at_level(logging.INFO):
        RequestRecord("id-1", "POST", "/v1/completions", status=200, prompt_tokens=5).write()
        RequestRecord("id-2", "GET", "/health", status=200).write()
    assert [r.getMessage() for r in caplog.records] == ["POST /v1/completions 200"]
    fields = getattr(caplog.records[0], FIELDS)
    assert fields["id"] == "id-1"
    assert fields["prompt_tokens"] == 5
    assert "prompt" not in fields
