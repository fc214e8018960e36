"""Parts of weight files: what is downloaded, and what a failure leaves."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from lockstep.errors import UsageError
from lockstep.model import hub, hub_parts, rows
from lockstep.model.headers import TensorInfo
from waiting import wait_until

CONTENT = bytes(range(200))


def tensor(offset: int, nbytes: int = 8, file: str = "model.safetensors") -> TensorInfo:
    return TensorInfo(file, "U8", (nbytes,), offset, nbytes)


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A snapshot whose weight file is CONTENT; reading its byte 100 fails."""

    def read(path, file, first, end):
        if first <= 100 < end:
            raise UsageError("it broke")
        return CONTENT[first:end]

    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "read", read)
    monkeypatch.setattr(hub, "data_start", lambda path, file: 0)
    return tmp_path / "models--org--one" / "snapshots" / "c"


def bytes_of(snapshot):
    """Of each tensor that is here."""
    start = {part: 8 + int.from_bytes(part.read_bytes()[:8], "little") for part in hub_parts._here(snapshot)}
    return {
        name: part.read_bytes()[start[part] + t.offset :][: t.nbytes]
        for part in start
        for name, t in hub_parts.held(snapshot).items()
        if part.name == t.file
    }


def test_tensors_of_one_file_are_one_part(snapshot):
    hub_parts.fetch(snapshot, {"a": tensor(0), "b": tensor(8), "c": tensor(40), "none": tensor(48, 0)})
    assert len(hub_parts._here(snapshot)) == 1
    assert bytes_of(snapshot) == {"a": CONTENT[:8], "b": CONTENT[8:16], "c": CONTENT[40:48], "none": b""}
    assert hub_parts.files(snapshot) == {"model.safetensors"}


def test_no_part_is_larger_than_it_may_be_unless_its_tensor_is(snapshot, monkeypatch):
    monkeypatch.setattr(hub_parts, "PART_BYTES", 16)
    monkeypatch.setattr(hub_parts, "REQUEST_BYTES", 5)
    hub_parts.fetch(snapshot, {str(i): tensor(8 * i) for i in range(5)} | {"large": tensor(40, 30)})
    sizes = Counter[str]()
    for held in hub_parts.held(snapshot).values():
        sizes[held.file] += held.nbytes
    assert sorted(sizes.values()) == [8, 16, 16, 30]
    assert bytes_of(snapshot)["large"] == CONTENT[40:70]


def test_what_came_before_a_failure_stays(snapshot, monkeypatch):
    monkeypatch.setattr(hub, "PARALLEL_REQUESTS", 1)
    monkeypatch.setattr(hub_parts, "PART_BYTES", 8)
    with pytest.raises(UsageError, match="it broke"):
        hub_parts.fetch(snapshot, {"a": tensor(0), "b": tensor(20), "broken": tensor(96)})
    assert hub_parts.held(snapshot).keys() == {"a", "b"}
    assert not list(hub.kept_folder(snapshot).glob(".parts-*"))


def test_a_disk_without_room_is_told_with_the_numbers(snapshot):
    with pytest.raises(UsageError, match=r"1000000000.0 GB are to be downloaded .* make room"):
        hub_parts.fetch(snapshot, {"a": tensor(0, 10**18)})


def test_rows_are_kept_apart_from_whole_tensors_and_asked_for_once(snapshot, monkeypatch):
    asked = []
    read = hub.read
    monkeypatch.setattr(hub, "read", lambda *place: asked.append(place) or read(*place))
    matrix = TensorInfo("model.safetensors", "U8", (4, 5), 20, 20)
    some = {rows.name_of("m", each): rows.of(matrix, each) for each in ((0, 1), (2, 4))}
    for _ in range(2):
        hub_parts.fetch(snapshot, {"whole": tensor(0)} | some)
    assert sorted(place[2:] for place in asked) == [(0, 8), (20, 25), (30, 40)]
    assert hub_parts.held(snapshot).keys() == {"whole"}
    held = hub_parts.held_rows(snapshot)["m"]
    assert {these: tensor.shape for these, tensor in held.items()} == {(0, 1): (1, 5), (2, 4): (2, 5)}
    assert len({tensor.file for tensor in (*held.values(), hub_parts.held(snapshot)["whole"])}) == 2


def test_one_process_downloads_at_a_time_and_the_other_says_that_it_waits(snapshot, monkeypatch, caplog):
    monkeypatch.setattr(hub_parts, "TELL_AFTER_S", 0.01)
    caplog.set_level(logging.INFO)
    folder = hub.kept_folder(snapshot)
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / ".lock"):
            other = pool.submit(hub_parts.fetch, snapshot, {"a": tensor(0)})
            wait_until(lambda: "waiting for another process, which downloads org/one" in caplog.text, 10)
            assert hub_parts.held(snapshot) == {}
        other.result(10)
    assert hub_parts.held(snapshot).keys() == {"a"}
