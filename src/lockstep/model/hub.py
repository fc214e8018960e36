"""Models on the Hugging Face Hub: metadata first, then only the weights that a rank asks for.

Whole files live in the Hub's own cache. The headers of weight files that are not here are read by ranged
requests and kept in Lockstep's cache, so that a second run can plan without the network.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lockstep.errors import UsageError, in_a_line
from lockstep.model.cache import cache_folder, write_atomically
from lockstep.model.headers import LENGTH_BYTES, TensorInfo, tensors_start

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")

_METADATA = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.jsonl"]
PARALLEL_REQUESTS = 8

_log = logging.getLogger(__name__)


def metadata(name: str) -> Path:
    """Download config, tokenizer and index of `org/name[@revision]`; the snapshot's folder."""
    from huggingface_hub import snapshot_download

    match = NAME.fullmatch(name)
    assert match, name
    _bars_on_terminals_only()
    with _explained(match["repo"], match["revision"]):
        folder = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=_METADATA)
    return Path(folder)


def is_snapshot(path: Path) -> bool:
    """Whether a folder is a snapshot in the Hub's cache: .../models--org--name/snapshots/commit."""
    return path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")


def download(path: Path, files: Sequence[str]) -> None:
    """Download these files of a snapshot. Raises UsageError when they cannot be had."""
    from huggingface_hub import errors, snapshot_download

    announce(path, f"{len(files)} files")
    _bars_on_terminals_only()
    with _explained(repository(path), path.name):
        snapshot_download(repository(path), revision=path.name, allow_patterns=list(files))
        if lacking := [file for file in files if not (path / file).exists()]:
            # Without the network the Hub's client returns the folder as it is.
            raise errors.LocalEntryNotFoundError(f"{lacking[0]} is missing")


def announce(path: Path, what: str) -> None:
    """Tell that a download of so much begins."""
    _log.info("downloading %s of %s", what, repository(path))


def data_start(path: Path, file: str) -> int:
    """The byte of a weight file of a snapshot at which its tensors begin."""
    return tensors_start(read(path, file, 0, LENGTH_BYTES))


def read(path: Path, file: str, first: int, end: int) -> bytes:
    """Bytes [first, end) of a file of a snapshot on the Hub. Raises UsageError when they cannot be had."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(repository(path), file, revision=path.name)
    headers = build_hf_headers() | {"Range": f"bytes={first}-{end - 1}"}
    with _explained(repository(path), path.name):
        reply = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(reply)
    if len(reply.content) != end - first:
        raise UsageError(
            f"{repository(path)}: asked for {end - first} bytes of {file}, the Hub, or a proxy before it, "
            f"sent {len(reply.content)}: download the model with `hf download {repository(path)}`"
        )
    return bytes(reply.content)


def headers(path: Path, absent: Sequence[str], present: Sequence[str]) -> dict[str, TensorInfo]:
    """The tensors of weight files that are not here.

    Where there is neither an index nor the single file of a model that needs none, the Hub is asked.
    """
    if not absent and not any((path / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        absent = sorted(set(_weight_files(path)) - set(present))
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        found = pool.map(lambda file: _header(path, file), absent)
        return {name: tensor for tensors in found for name, tensor in tensors.items()}


def _weight_files(path: Path) -> list[str]:
    kept = kept_folder(path) / "files.json"
    if kept.exists():
        return list(json.loads(kept.read_text()))
    from huggingface_hub import HfApi

    with _explained(repository(path), path.name):
        files = HfApi().list_repo_files(repository(path), revision=path.name)
    weights = [file for file in files if re.fullmatch(r"model[^/]*\.safetensors", file)]
    write_atomically(kept, json.dumps(weights))
    return weights


def _header(path: Path, file: str) -> dict[str, TensorInfo]:
    kept = kept_folder(path) / f"{file}.json"
    if kept.exists():
        entries = json.loads(kept.read_text())
        return {
            name: TensorInfo(**(entry | {"shape": tuple(entry["shape"])})) for name, entry in entries.items()
        }
    from huggingface_hub import HfApi

    with _explained(repository(path), path.name):
        header = HfApi().parse_safetensors_file_metadata(repository(path), file, revision=path.name)
    tensors = {
        name: TensorInfo(
            file=file,
            dtype=str(tensor.dtype),
            shape=tuple(tensor.shape),
            offset=tensor.data_offsets[0],
            nbytes=tensor.data_offsets[1] - tensor.data_offsets[0],
        )
        for name, tensor in header.tensors.items()
    }
    write_atomically(kept, json.dumps({name: asdict(tensor) for name, tensor in tensors.items()}))
    return tensors


def repository(path: Path) -> str:
    """`org/name` of a snapshot."""
    _, organisation, name = path.parent.parent.name.split("--", 2)
    return f"{organisation}/{name}"


def kept_folder(path: Path) -> Path:
    """Where Lockstep keeps what it knows and has of a snapshot. It may not exist yet."""
    return cache_folder() / "hub" / path.parent.parent.name / path.name


def _bars_on_terminals_only() -> None:
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into one line with a remedy."""
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"{name} is no name that the Hub allows, and no folder: {error}") from error
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{name} is gated: accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repo} has no revision {revision}: check the part behind the @") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"the Hub has no model {repo}, or it is private: check the name, or run `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError) as error:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise UsageError(
            f"{name} is not complete on this machine and {endpoint} cannot be reached or fails "
            f"({_first_cause(error)}): check the network and HF_HUB_OFFLINE, or give the model's folder"
        ) from error
    except errors.SafetensorsParsingError as error:
        raise UsageError(
            f"{name}: a weight file on the Hub is broken ({error}): choose another revision"
        ) from error


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return in_a_line(error)
