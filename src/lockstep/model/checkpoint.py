"""Where a model comes from and what is in it: a local folder, the Hugging Face Hub, or the built-in default.

Nothing here reads weights. A model on the Hub is planned from its metadata; a rank then fetches only the
files that hold its own layers.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import UsageError
from lockstep.model import default_model, hub
from lockstep.model.costs import ModelCosts, model_costs
from lockstep.model.headers import AGAIN, TensorInfo, read_header, write_hollow
from lockstep.model.quantized import Held

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model's config and tensors. Files of a Hub model may still be absent: see `fetch`."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def missing(self, files: Iterable[str]) -> list[str]:
        """Those of these files that are not on this machine yet."""
        return sorted(file for file in set(files) if not (self.path / file).exists())

    def fetch(self, files: Iterable[str]) -> None:
        """Download those of these weight files that are not here yet, and check what came."""
        missing = self.missing(files)
        if not missing:
            return
        hub.download(self.path, missing)
        for file in missing:
            _check_same(read_header(self.path / file), self.tensors, file)

    @contextmanager
    def opened(self, hollow: bool = False) -> Iterator[Path]:
        """A folder that mlx-lm can load lazily although files of other ranks' layers are not here.

        Absent files, or all if `hollow`, are stood in for by empty ones of the right size and header, which
        are cut off at the end: whoever evaluates one of their tensors gets mlx's RuntimeError, never zeros.
        """
        files = {tensor.file for tensor in self.tensors.values()}
        absent = sorted(files) if hollow else self.missing(files)
        if not absent:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="lockstep-") as name:
            folder = Path(name)
            for file in self.path.iterdir():
                if file.name not in absent:
                    (folder / file.name).symlink_to(file.resolve())
            for missing in absent:
                held = {name: tensor for name, tensor in self.tensors.items() if tensor.file == missing}
                write_hollow(folder / missing, held)
            try:
                yield folder
            finally:
                for missing in absent:
                    os.truncate(folder / missing, 0)


def resolve(name: str | None) -> Path:
    """The folder of a model, in Hugging Face layout. Of a Hub model only the metadata is downloaded.

    `name` is a folder, `org/name[@revision]` on the Hub, or None for the default model, which is made on
    first use. Raises UsageError when there is no such model or it cannot be reached.
    """
    if name is None or name == default_model.NAME:
        return default_model.folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"--model {name} is a file: give the folder that holds config.json and the weights")
    if not hub.NAME.fullmatch(name):
        raise UsageError(
            f"--model {name}: no such folder. Give a folder, a Hub name like org/name, or nothing for "
            f"{default_model.NAME}"
        )
    return hub.metadata(name)


def config(path: Path) -> dict[str, Any]:
    """The model's configuration. Raises UsageError for a file that is missing or broken."""
    return _read_json(path / "config.json")


def inspect(path: Path) -> Checkpoint:
    """Read config and all headers. Raises UsageError naming a broken or missing file and its tensor."""
    own = config(path)
    absent: dict[str, TensorInfo] = {}
    index = _read_json(path / _INDEX).get("weight_map", {}) if (path / _INDEX).exists() else {}
    present = sorted(file.name for file in path.glob("model*.safetensors"))
    missing = sorted(set(index.values()) - set(present))
    if hub.is_snapshot(path):
        absent = hub.headers(path, missing, present)
    elif missing:
        tensor = next(name for name, file in index.items() if file == missing[0])
        raise UsageError(f"{path / missing[0]} is missing ({_INDEX} says it holds {tensor}): {AGAIN}")
    tensors = dict(absent)
    for file in present:
        tensors |= read_header(path / file)
    if not tensors:
        raise UsageError(f"{path} holds no model*.safetensors: convert the model with `mlx_lm.convert` first")
    for name, file in index.items():
        if name not in tensors:
            raise UsageError(f"{path / file} lacks tensor {name}, which {_INDEX} names: {AGAIN}")
    return Checkpoint(path, own, tensors)


def costs(checkpoint: Checkpoint, held: Held) -> ModelCosts:
    """What the model costs a rank that holds it in this form."""
    return model_costs(checkpoint.config, checkpoint.tensors, held)


def title(path: Path) -> str:
    """What people call the model in this folder."""
    return hub.repository(path) if hub.is_snapshot(path) else path.resolve().name


def _check_same(found: dict[str, TensorInfo], expected: dict[str, TensorInfo], file: str) -> None:
    for name, tensor in found.items():
        if expected.get(name) != tensor:
            raise UsageError(f"{file}: tensor {name} is not what the Hub's header says: {AGAIN}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: {path.parent} is no model folder, or is incomplete") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a JSON object: {AGAIN}")
    return content
