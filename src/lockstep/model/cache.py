"""Lockstep's own folder for what can be made again: converted models and headers of remote files."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from lockstep.errors import UsageError


def cache_folder() -> Path:
    """$LOCKSTEP_CACHE, or the place where this platform keeps caches. It may not exist yet.

    Raises UsageError for the home folder of nobody.
    """
    if chosen := os.environ.get("LOCKSTEP_CACHE"):
        try:
            return Path(chosen).expanduser()
        except RuntimeError as error:
            raise UsageError(f"LOCKSTEP_CACHE={chosen}: there is no such user") from error
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lockstep"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"


def expanded(name: str) -> Path:
    """The path with the home folder for a `~` at its beginning; as it is where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def make_folder(folder: Path) -> None:
    """Make a folder of the cache where there is none. Raises UsageError if it cannot be written into."""
    remedy = "set LOCKSTEP_CACHE to another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}; {remedy}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write into {folder}; {remedy}")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that readers see either whole or not at all. Raises what `make_folder` raises."""
    make_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(temporary).replace(path)
