"""Parts of weight files on the Hub: tensors, or rows of some, that a rank needs, as files of their own.

They lie in Lockstep's cache, because the Hub's own holds whole files only. A part has tensors of one file
and is named after both.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from lockstep.errors import UsageError
from lockstep.model import hub, rows
from lockstep.model.cache import make_folder
from lockstep.model.headers import TensorInfo, header, read_header
from lockstep.model.rows import Range

PART_BYTES = 1 << 28
"""Of a part that has more than one tensor, at most. It is what a download that is broken off loses."""

REQUEST_BYTES = 1 << 24
"""At most; so much of each part is in memory at a time."""

_BYTES = "-bytes-"
_UNFINISHED = ".parts-"
_LOCK = ".lock"
TELL_AFTER_S = 1.0
_ABANDONED_S = 86_400
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Tensors of one file, in the order in which they lie there, by where they do."""

    file: str
    tensors: dict[str, TensorInfo]

    @property
    def name(self) -> str:
        """That of its own file, which mlx-lm takes for one with weights."""
        digest = hashlib.sha256("\n".join(self.tensors).encode()).hexdigest()[:16]
        return f"{Path(self.file).stem}{_BYTES}{digest}.safetensors"


def files(path: Path) -> set[str]:
    """The files of the snapshot `path` of which parts are here."""
    return {f"{part.name.partition(_BYTES)[0]}.safetensors" for part in _here(path)}


def held(path: Path) -> dict[str, TensorInfo]:
    """The whole tensors in all parts that are here of the snapshot `path`, by where they are in the parts."""
    return {name: tensor for name, tensor in _tensors(path).items() if rows.named(name) is None}


def held_rows(path: Path) -> dict[str, dict[Range, TensorInfo]]:
    """The same of tensors of which some rows are here."""
    found: dict[str, dict[Range, TensorInfo]] = {}
    for name, tensor in _tensors(path).items():
        if some := rows.named(name):
            found.setdefault(some[0], {})[some[1]] = tensor
    return found


def fetch(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Download these tensors of the snapshot `path`, or rows of tensors, by where they are on the Hub.

    Of several processes one does it at a time, and what it got the others need not get again. Raises
    UsageError when they cannot be had, or kept.
    """
    folder = hub.kept_folder(path)
    try:
        make_folder(folder)
        with _alone(path, folder):
            here = _tensors(path)
            if lacking := {name: tensor for name, tensor in tensors.items() if name not in here}:
                _fetch(path, lacking, folder)
    except OSError as error:
        raise UsageError(f"cannot keep {hub.repository(path)} in {folder}: {error.strerror}") from error


@contextlib.contextmanager
def _alone(path: Path, folder: Path) -> Iterator[None]:
    """While no other process downloads to this folder. How long that may take is the watchdog's to say."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=TELL_AFTER_S)
    except Timeout:
        _log.info("waiting for another process, which downloads %s, too", hub.repository(path))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(path: Path, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    _clean(folder)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    if needed > (free := shutil.disk_usage(folder).free):
        raise UsageError(
            f"{hub.repository(path)}: {needed / 1e9:.1f} GB are to be downloaded to {folder}, where "
            f"{free / 1e9:.1f} GB are free: make room, or set LOCKSTEP_CACHE to a folder on a larger disk"
        )
    hub.announce(path, f"{needed / 1e6:.0f} MB")
    whole = {name: tensor for name, tensor in tensors.items() if rows.named(name) is None}
    some = {name: tensor for name, tensor in tensors.items() if name not in whole}
    # Apart, because mlx-lm reads the files of whole tensors.
    parts = [*_parts(whole), *_parts(some)]
    files = sorted({part.file for part in parts})
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as unfinished,
        ThreadPoolExecutor(hub.PARALLEL_REQUESTS) as pool,
    ):
        starts = dict(zip(files, pool.map(lambda file: hub.data_start(path, file), files), strict=True))
        written = pool.map(lambda part: _write(path, part, starts[part.file], Path(unfinished)), parts)
        done, told = 0, 0
        for size in written:
            done += size
            if told + needed // 10 < done < needed:
                told = done
                _log.info("%d%% of it is here", 100 * done // needed)


def _clean(folder: Path) -> None:
    """Remove what downloads left that were killed."""
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):  # of a machine that shares the folder but not the lock
            if time.time() - unfinished.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(unfinished, ignore_errors=True)


def _tensors(path: Path) -> dict[str, TensorInfo]:
    return {name: tensor for part in _here(path) for name, tensor in read_header(part).items()}


def _here(path: Path) -> list[Path]:
    return sorted(hub.kept_folder(path).glob(f"model*{_BYTES}*.safetensors"))


def _parts(tensors: Mapping[str, TensorInfo]) -> Iterator[Part]:
    some: dict[str, TensorInfo] = {}
    file, size = "", 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        if some and (tensor.file != file or size + tensor.nbytes > PART_BYTES):
            yield Part(file, some)
            some, size = {}, 0
        some[name] = tensor
        file, size = tensor.file, size + tensor.nbytes
    if some:
        yield Part(file, some)


def _write(path: Path, part: Part, start: int, folder: Path) -> int:
    """Make the file of this part, in `folder` until it is whole; returns the bytes of its tensors.

    In the file on the Hub, tensors start at the byte `start`.
    """
    own, size = {}, 0
    for name, tensor in part.tensors.items():
        own[name] = replace(tensor, offset=size)
        size += tensor.nbytes
    unfinished = folder / part.name
    with unfinished.open("wb") as file:
        file.write(header(own))
        for first, end in _requests(part.tensors.values()):
            file.write(hub.read(path, part.file, start + first, start + end))
    unfinished.rename(hub.kept_folder(path) / part.name)
    return size


def _requests(tensors: Iterable[TensorInfo]) -> Iterator[Range]:
    """The first byte and the last + 1 of each request for these tensors of one file, in their order."""
    runs: list[Range] = []
    for tensor in tensors:
        end = tensor.offset + tensor.nbytes
        if runs and runs[-1][1] == tensor.offset:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((tensor.offset, end))
    for first, end in runs:
        for at in range(first, end, REQUEST_BYTES):
            yield at, min(at + REQUEST_BYTES, end)
