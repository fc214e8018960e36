from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny_tokenizer
from front_process import FrontProcess, ScriptedEngine, front_process
from lockstep.engine.text import Tokenizer, load_tokenizer
from lockstep.engine.wire import LinkConfig
from ranks import free_ports


@dataclass
class Served:
    front: FrontProcess
    engine: ScriptedEngine
    url: str


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tiny_tokenizer.byte_level(tmp_path_factory.mktemp("tiny"), tiny_tokenizer.CALLING)


@pytest.fixture(scope="session")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def link_config() -> LinkConfig:
    return LinkConfig.make(free_ports(1)[0])


@pytest.fixture(scope="session")
def served(folder, tokenizer, tmp_path_factory) -> Iterator[Served]:
    """A front with a scripted rank 0, shared by all tests that leave both as they found them."""
    link = LinkConfig.make(free_ports(1)[0])
    engine = ScriptedEngine(link, tokenizer, "run-1")
    with front_process(folder, link, tmp_path_factory.mktemp("served"), max_body_bytes=200_000) as front:
        front.wait_ready()
        yield Served(front, engine, front.url)
    engine.stop()
