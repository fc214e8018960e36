"""Where a model comes from and what is in it: a local folder, the Hugging Face Hub, or the built-in default.

Nothing here reads weights. A model on the Hub is planned from its metadata; a rank then fetches only the
tensors that it needs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lockstep.errors import UsageError
from lockstep.model import default_model, hub, hub_parts, rows
from lockstep.model.cache import expanded
from lockstep.model.costs import ModelCosts, model_costs
from lockstep.model.headers import AGAIN, TensorInfo, read_header, write_hollow
from lockstep.model.quantized import Held
from lockstep.model.rows import Range, Rows

_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
_VOCABULARIES = ("*.model", "*.tiktoken", "vocab*", "tekken.json", "tokenization*.py")
"""What tokenizers are made from where there is no tokenizer.json."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's config and tensors. Those of a Hub model may still be absent: see `fetch`.

    `rows` are those that are here of tensors that are not here whole.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    rows: Mapping[str, Rows] = field(default_factory=dict)

    def local(self, file: str) -> Path:
        """Where a tensor's file is on this machine, if it is."""
        own = self.path / file
        return own if own.exists() or not hub.is_snapshot(self.path) else hub.kept_folder(self.path) / file

    def absent(self) -> dict[str, TensorInfo]:
        """The tensors that are not on this machine yet."""
        files = {file for file in self._files() if not self.local(file).exists()}
        return {name: tensor for name, tensor in self.tensors.items() if tensor.file in files}

    def fetch(self, names: Iterable[str], some: Mapping[str, Collection[Range]] | None = None) -> Checkpoint:
        """Download those of these tensors that are not here yet, of `some` only these rows; returns what is
        here then.

        A file that is needed whole goes where other programs find it, too.
        """
        absent = self.absent()
        wanted = {name: absent[name] for name in names if name in absent}
        wanted_rows = {
            rows.name_of(name, lacking): rows.of(absent[name], lacking)
            for name, ranges in (some or {}).items()
            if name in absent and name not in wanted
            for each in ranges
            for lacking in rows.cover(self.rows.get(name, {}), each)[1]
        }
        if not wanted and not wanted_rows:
            return self
        in_parts = hub_parts.files(self.path)
        in_parts |= {tensor.file for name, tensor in absent.items() if name not in wanted}
        whole = sorted({tensor.file for tensor in wanted.values()} - in_parts)
        if whole:
            hub.download(self.path, whole)
        for file in whole:
            _check_same(read_header(self.path / file), self.tensors, file)
        if rest := {name: tensor for name, tensor in wanted.items() if tensor.file in in_parts} | wanted_rows:
            hub_parts.fetch(self.path, rest)
        return inspect(self.path)

    @contextmanager
    def opened(self, hollow: bool = False) -> Iterator[Path]:
        """A folder that mlx-lm can load lazily although tensors of other ranks' layers are not here.

        Absent tensors, or all if `hollow`, are in files of the right size and header without anything in
        them, which are cut off at the end: whoever evaluates one gets mlx's RuntimeError, never zeros.
        """
        absent = self.tensors if hollow else self.absent()
        files = self._files()
        if not absent and all((self.path / file).exists() for file in files):
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="lockstep-") as name:
            folder = Path(name)
            for other in self.path.iterdir():
                if other.name not in files:
                    (folder / other.name).symlink_to(other.resolve())
            missing = {tensor.file for tensor in absent.values()}
            for file in files - missing:
                (folder / file).symlink_to(self.local(file).resolve())
            for file in missing:
                write_hollow(folder / file, {name: t for name, t in absent.items() if t.file == file})
            try:
                yield folder
            finally:
                for file in missing:
                    os.truncate(folder / file, 0)

    def _files(self) -> set[str]:
        return {tensor.file for tensor in self.tensors.values()}


def resolve(name: str | None) -> Path:
    """The folder of a model, in Hugging Face layout. Of a Hub model only the metadata is downloaded.

    `name` is a folder, `org/name[@revision]` on the Hub, or None for the default model, which is made on
    first use. Raises UsageError when there is no such model or it cannot be reached.
    """
    if name is None or name == default_model.NAME:
        return default_model.folder()
    path = expanded(name)
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
        absent = hub.headers(path, missing, present) | hub_parts.held(path)
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
    found = Checkpoint(path, own, tensors)
    if not hub.is_snapshot(path):
        return found
    some = hub_parts.held_rows(path)
    return replace(found, rows={name: some[name] for name in some.keys() & found.absent().keys()})


def check_tokenizer(path: Path) -> None:
    """Raises UsageError for a folder without a tokenizer, or with one that is broken."""
    if (path / _TOKENIZER).exists():
        content = _read_json(path / _TOKENIZER)
        if "model" not in content:
            raise UsageError(f'{path / _TOKENIZER} is not a tokenizer (it has no "model"): {AGAIN}')
    elif not any(found for pattern in _VOCABULARIES for found in path.glob(pattern)):
        raise UsageError(f"{path / _TOKENIZER} is missing: {AGAIN}")


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: {path.parent} is no model folder, or is incomplete") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a JSON object: {AGAIN}")
    return content
