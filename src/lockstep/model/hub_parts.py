"""Parts of weight files on the Hub: the tensors that a rank needs, as safetensors files of their own.

They lie in Lockstep's cache, because the Hub's own holds whole files only. A part is a run of bytes of its
file, and named after both.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lockstep.errors import UsageError
from lockstep.model import hub
from lockstep.model.cache import make_folder
from lockstep.model.headers import TensorInfo, header, read_header

PART_BYTES = 1 << 28
"""Of a part that has more than one tensor, at most. It is what a download that is broken off loses."""

REQUEST_BYTES = 1 << 24
"""At most; so much of each part is in memory at a time."""

_BYTES = "-bytes-"
_UNFINISHED = ".parts-"
_ABANDONED_S = 86_400
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Tensors that lie one behind the other in a file: its bytes [first, end), counted as their offsets."""

    tensors: dict[str, TensorInfo]
    file: str
    first: int
    end: int

    @property
    def part(self) -> str:
        """The name of its file here, which mlx-lm takes for one with weights."""
        return f"{Path(self.file).stem}{_BYTES}{self.first}-{self.end}.safetensors"

    def joined(self, name: str, tensor: TensorInfo) -> Run | None:
        """With this tensor, too, if it lies behind the others and a part may have as much."""
        end = tensor.offset + tensor.nbytes
        if tensor.file != self.file or tensor.offset != self.end or end - self.first > PART_BYTES:
            return None
        return Run(self.tensors | {name: tensor}, self.file, self.first, end)


def files(path: Path) -> set[str]:
    """The files of the snapshot `path` of which parts are here."""
    return {f"{part.name.partition(_BYTES)[0]}.safetensors" for part in _here(path)}


def held(path: Path) -> dict[str, TensorInfo]:
    """The tensors in all parts that are here of the snapshot `path`, by where they are in the parts."""
    return {name: tensor for part in _here(path) for name, tensor in read_header(part).items()}


def fetch(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Download these tensors of the snapshot `path`, by where they are on the Hub.

    Raises UsageError when they cannot be had, or kept.
    """
    folder = hub.kept_folder(path)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    try:
        make_folder(folder)
        _clean(folder)
        if needed > (free := shutil.disk_usage(folder).free):
            raise UsageError(
                f"{hub.repository(path)}: {needed / 1e9:.1f} GB are to be downloaded to {folder}, where "
                f"{free / 1e9:.1f} GB are free: make room, or set LOCKSTEP_CACHE to a folder on a larger disk"
            )
        _fetch(path, list(_runs(tensors)), folder, needed)
    except OSError as error:
        raise UsageError(f"cannot keep {hub.repository(path)} in {folder}: {error.strerror}") from error


def _fetch(path: Path, runs: Sequence[Run], folder: Path, needed: int) -> None:
    whole = sorted({run.file for run in runs})
    hub.announce(path, f"{needed / 1e6:.0f} MB")
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as unfinished,
        ThreadPoolExecutor(hub.PARALLEL_REQUESTS) as pool,
    ):
        starts = dict(zip(whole, pool.map(lambda file: hub.data_start(path, file), whole), strict=True))
        written = pool.map(lambda run: _write(path, run, starts[run.file], Path(unfinished)), runs)
        done, told = 0, 0
        for size in written:
            done += size
            if told + needed // 10 < done < needed:
                told = done
                _log.info("%d%% of it is here", 100 * done // needed)


def _clean(folder: Path) -> None:
    """Remove what downloads left that were killed."""
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):  # Another rank has just come to its end.
            if time.time() - unfinished.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(unfinished, ignore_errors=True)


def _here(path: Path) -> list[Path]:
    return sorted(hub.kept_folder(path).glob(f"model*{_BYTES}*.safetensors"))


def _runs(tensors: Mapping[str, TensorInfo]) -> Iterator[Run]:
    run = None
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        longer = run and run.joined(name, tensor)
        if run and not longer:
            yield run
        run = longer or Run({name: tensor}, tensor.file, tensor.offset, tensor.offset + tensor.nbytes)
    if run:
        yield run


def _write(path: Path, run: Run, start: int, folder: Path) -> int:
    """Make the part with this run, in `folder` until it is whole; returns the bytes of its tensors.

    In its file on the Hub, tensors start at the byte `start`.
    """
    own = {name: replace(tensor, offset=tensor.offset - run.first) for name, tensor in run.tensors.items()}
    part = folder / run.part
    with part.open("wb") as file:
        file.write(header(own))
        for first in range(run.first, run.end, REQUEST_BYTES):
            last = min(first + REQUEST_BYTES, run.end)
            file.write(hub.read(path, run.file, start + first, start + last))
    part.rename(hub.kept_folder(path) / part.name)
    return run.end - run.first
