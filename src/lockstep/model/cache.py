"""Lockstep's own folder for what can be made again: converted models and headers of remote files."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$LOCKSTEP_CACHE, or the place where this platform keeps caches. It may not exist yet."""
    if chosen := os.environ.get("LOCKSTEP_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lockstep"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"


def write_atomically(path: Path, text: str) -> None:
    """Write a file that readers see either whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(temporary).replace(path)
