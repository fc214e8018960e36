from __future__ import annotations

import asyncio

import pytest

from lockstep.bench.client import Ask, Endpoint, Sample, ask

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
STREAM = (
    b": keep-alive\n\n"
    b'data: {"choices": [{"text": "a"}]}\n\n'
    b'data: {"choices": [{"text": ""}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "b"}}]}\n\n'
    b'data: {"choices": [{"delta": {"reasoning_content": "c"}}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}\n\n'
    b"data: [DONE]\n\n"
)
UNFINISHED = STREAM.removesuffix(b"data: [DONE]\n\n")
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def asked(answer: bytes, timeout_s: float = 5.0, api_key: str | None = None) -> tuple[Sample, bytes]:
    """What a client makes of these bytes, and what it sent."""
    return asyncio.run(_asked(answer, timeout_s, api_key))


async def _asked(answer: bytes, timeout_s: float, api_key: str | None) -> tuple[Sample, bytes]:
    sent = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        sent = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if not answer:
            await reader.read()  # Until the client gives up.
        writer.close()
        answered.set()

    answered = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", api_key=api_key)
    sample = await ask(endpoint, Ask(" the cat", 5), timeout_s)
    await asyncio.wait_for(answered.wait(), 10)
    server.close()
    return sample, sent


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_read_however_they_are_cut_into_chunks(size):
    sample, sent = asked(OK + CHUNKED + chunked(STREAM, size))
    assert not sample.error
    assert (sample.prompt_tokens, sample.completion_tokens) == (7, 5)
    assert sample.begun_s <= sample.first_s <= sample.last_s <= sample.ended_s
    assert sent.startswith(b"POST /v1/completions HTTP/1.1\r\n")


def test_an_answer_without_a_length_ends_with_its_connection():
    sample, _ = asked(OK + b"\r\n" + STREAM)
    assert sample.completion_tokens == 5


def test_without_usage_the_pieces_of_text_are_counted():
    sample, _ = asked(OK + b"\r\n" + STREAM.replace(b'"usage"', b'"other"'))
    assert sample.completion_tokens == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull", "status 429: full"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no answer over HTTP"),
        (OK + b"\r\ndata: [DONE]\n\n", "no text"),
        (OK + b"\r\ndata: {not json\n\n", "malformed"),
        (OK + CHUNKED + b"ff\r\nhalf", "bytes read"),
        (b"HTTP/1.1 200 OK\r\n", "bytes read"),
        (OK + CHUNKED + chunked(UNFINISHED, 7).removesuffix(b"0\r\n\r\n"), "connection broke"),
        (OK + CHUNKED + chunked(UNFINISHED, 7), "ended before its [DONE]"),
        (OK + b"\r\n" + UNFINISHED, "ended before its [DONE]"),
        (OK + b"\r\n" + UNFINISHED + b'data: {"error": {"message": "No engine"}}\n\n', "No engine"),
        (OK + b"\r\n" + UNFINISHED + b'data: {"error": "overloaded"}\n\ndata: [DONE]\n\n', "overloaded"),
    ],
)
def test_a_bad_answer_becomes_an_error_and_not_an_exception(answer, error):
    sample, _ = asked(answer)
    assert error in sample.error


def test_a_server_that_never_answers_is_given_up():
    sample, _ = asked(b"", timeout_s=0.2)
    assert "no answer within 0.2 s" in sample.error


def test_nobody_listening_is_an_error():
    sample = asyncio.run(ask(Endpoint("http://127.0.0.1:1"), Ask(" a", 1), 5))
    assert "Connect call failed" in sample.error


def test_the_key_is_sent():
    _, sent = asked(OK + b"\r\n" + STREAM, api_key="s3cret")
    assert b"authorization: Bearer s3cret\r\n" in sent
