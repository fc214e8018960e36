"""One client of a server that speaks OpenAI's streaming completions.

No HTTP library: a load must cost little beside the server it measures.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import msgspec

from lockstep.errors import LockstepError


@dataclass(frozen=True)
class Endpoint:
    """A server by its address, with or without `/v1`; `model` None leaves the field out."""

    url: str
    model: str | None = None
    api_key: str | None = None

    @property
    def address(self) -> SplitResult:
        return urlsplit(self.url if "//" in self.url else f"http://{self.url}")


@dataclass(frozen=True)
class Ask:
    """One request to be made."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it. Times are of one clock; `error` is empty when all went well."""

    begun_s: float
    ended_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    longest_gap_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_s - self.begun_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.last_s - self.first_s) / max(self.completion_tokens - 1, 1)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        """Whether it brings any, be it only thought."""
        delta = self.delta or _Delta()
        return bool(self.text or delta.content or delta.reasoning_content or delta.reasoning)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str = ""


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | str | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


async def ask(endpoint: Endpoint, what: Ask, timeout_s: float) -> Sample:
    """One greedy streamed completion. Never raises for what the server does: that becomes `error`."""
    begun_s = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            return await _ask(endpoint, what, begun_s)
    except TimeoutError:
        error = f"no answer within {timeout_s:g} s"
    except (OSError, EOFError, ValueError, LockstepError) as problem:
        error = str(problem) or type(problem).__name__
    return Sample(begun_s, time.perf_counter(), error=error)


async def _ask(endpoint: Endpoint, what: Ask, begun_s: float) -> Sample:
    body = {
        "prompt": what.prompt,
        "max_tokens": what.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint.model is not None:
        body["model"] = endpoint.model
    heard = _Heard()
    async with _connection(endpoint) as (reader, writer):
        writer.write(_request(endpoint, msgspec.json.encode(body)))
        status, headers = await _head(reader)
        pieces = _body(reader, headers)
        if status != 200:
            text = b"".join([piece async for piece in pieces]).decode(errors="replace")
            raise LockstepError(f"status {status}: {text[:200]}")
        async for data in _events(pieces):
            heard.take(_decode_chunk(data))
    if not heard.tokens:
        raise LockstepError("the answer has no text")
    usage = heard.usage or _Usage(0, heard.tokens)
    return Sample(
        begun_s,
        time.perf_counter(),
        heard.first_s,
        heard.last_s,
        heard.longest_gap_s,
        usage.prompt_tokens,
        usage.completion_tokens,
    )


@dataclass
class _Heard:
    """What one stream has said so far. Without `usage`, chunks with text count as tokens."""

    first_s: float = 0.0
    last_s: float = 0.0
    longest_gap_s: float = 0.0
    tokens: int = 0
    usage: _Usage | None = None

    def take(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            said = chunk.error if isinstance(chunk.error, str) else chunk.error.message
            raise LockstepError(f"the server ended the answer: {said[:200]}")
        self.usage = chunk.usage or self.usage
        if not any(choice.has_text for choice in chunk.choices):
            return
        now_s = time.perf_counter()
        if self.tokens:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_s)
        else:
            self.first_s = now_s
        self.last_s = now_s
        self.tokens += 1


@asynccontextmanager
async def _connection(endpoint: Endpoint) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    address = endpoint.address
    secure = address.scheme == "https"
    reader, writer = await asyncio.open_connection(
        address.hostname,
        address.port or (443 if secure else 80),
        ssl=ssl.create_default_context() if secure else None,
    )
    try:
        yield reader, writer
    finally:
        writer.close()


def _request(endpoint: Endpoint, body: bytes) -> bytes:
    path = endpoint.address.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    key = f"authorization: Bearer {endpoint.api_key}\r\n" if endpoint.api_key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {endpoint.address.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n{key}\r\n"
    )
    return head.encode() + body


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    parts = first.split()
    if len(parts) < 2 or not parts[1].isdecimal():
        raise LockstepError(f"{first[:80]!r} is no answer over HTTP")
    pairs = (line.partition(":") for line in lines if line)
    return int(parts[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        while piece := await reader.read(65536):
            yield piece
        return
    while size := await _chunk_size(reader):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _chunk_size(reader: asyncio.StreamReader) -> int:
    line = await reader.readline()
    if not line:
        raise LockstepError("the connection broke in the middle of the answer")
    return int(line.split(b";")[0], 16)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events, up to [DONE]. Raises LockstepError when they end without it."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for data in _data(lines):
            if data == b"[DONE]":
                return
            yield data
    raise LockstepError("the answer ended before its [DONE]")


def _data(lines: Iterable[bytes]) -> Iterator[bytes]:
    return (line[5:].strip() for line in lines if line.startswith(b"data:"))
