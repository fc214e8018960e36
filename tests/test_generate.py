"""`lockstep generate` on the real default model: the same text however many ranks there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command import lockstep
from lockstep.model import default_model
from lockstep.model.headers import read_header
from model import fake_hub
from ranks import SOURCE

PROMPT = "Name three rivers of Europe and say where they flow."
TOKENS = 24

REFERENCE = """
import sys
from lockstep.model.blas import prepare_blas
prepare_blas(2)
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model, load_tokenizer
from lockstep.model import checkpoint
from lockstep.model.precision import cpu_float32
path = checkpoint.resolve(None)
model, _ = load_model(path, lazy=True)
cpu_float32(model)
tokenizer = load_tokenizer(path)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[1]}], add_generation_prompt=True)
steps = generate_step(mx.array(prompt), model, max_tokens=int(sys.argv[2]))
print([token for token, _ in steps])
"""

Document = dict[str, object]


@pytest.fixture(scope="session")
def reference() -> list[int]:
    """Greedy tokens of mlx-lm's own generation: the same weights in the same dtype, unsharded."""
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, PROMPT, str(TOKENS)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1"},
    )
    tokens: list[int] = json.loads(done.stdout)
    return tokens


def generate(
    *arguments: str, before: tuple[str, ...] = (), env: dict[str, str] | None = None, says: str = ""
) -> Document:
    result = lockstep(
        "generate", PROMPT, "--json", "--max-tokens", str(TOKENS), *arguments, before=before, env=env
    )
    assert result.status == 0, result.stderr
    assert says in result.stderr
    assert not result.left
    document: Document = json.loads(result.stdout)
    return document


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "1"],
        ["-n", "2"],
        ["-n", "2", "--split", "7,23"],
        ["-n", "2", "--backend", "mpi"],
        ["-n", "3", "--backend", "mpi", "--split", "5,14,11"],
        ["-n", "2", "--parallel", "tensor", "--split", "2,1"],
        ["-n", "2", "--parallel", "tensor", "--backend", "mpi", "--split", "1,2"],
        ["-n", "3", "--parallel", "tensor", "--backend", "mpi"],
    ],
    ids=" ".join,
)
def test_greedy_tokens_are_those_of_mlx_lm(arguments: list[str], reference: list[int]) -> None:
    document = generate(*arguments)
    assert document["token_ids"] == reference
    assert document["completion_tokens"] == TOKENS
    assert document["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("arguments", "memory_gb"),
    [
        (["-n", "2", "--split", "7,23"], 0.48),
        (["-n", "2", "--parallel", "tensor", "--backend", "mpi", "--split", "1,2"], 0.45),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_in_float32_stay_as_stored_and_give_the_same_tokens(
    arguments: list[str], memory_gb: float, reference: list[int]
) -> None:
    env = {"LOCKSTEP_MEMORY_GB": str(memory_gb)}
    document = generate(*arguments, "--context", "256", env=env, says="weights stay as stored")
    assert document["token_ids"] == reference
    ranks: list[Document] = document["ranks"]  # type: ignore[assignment]
    # 4 bits and their scales; a pipeline holds the tied table twice.
    assert sum(rank["weight_bytes"] for rank in ranks) < 0.3 * 134_515_008 * 4  # type: ignore[misc]


@pytest.mark.parametrize("form", ["pipeline", "tensor"])
def test_of_a_model_on_the_hub_each_rank_downloads_its_own_part(
    tmp_path: Path, reference: list[int], form: str
) -> None:
    folder = default_model.folder()
    file = folder / "model.safetensors"
    split = {"pipeline": "7,23", "tensor": "2,1"}[form]
    with fake_hub.serve("org/smol", folder) as hub:
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        env |= {"LOCKSTEP_CACHE": str(tmp_path / "cache")}
        arguments = ["-n", "2", "--parallel", form, "--split", split, "--model", "org/smol"]
        document = generate(*arguments, env=env, says="downloading")
    assert document["token_ids"] == reference
    # Both stages of a pipeline have the table, tensor ranks have their rows of it.
    tables = sum(t.nbytes for name, t in read_header(file).items() if "embed_tokens" in name)
    twice = tables if form == "pipeline" else 0
    header = 100_001  # More than there is, for the planner.
    assert hub.sent[file.name] <= file.stat().st_size + twice + header
    assert not list((tmp_path / "hub").rglob(file.name)), "nobody needs the whole file"


@pytest.mark.parametrize("starter", [("mpirun", "-n", "2"), ("mlx.launch", "-n", "2", "--")], ids=" ".join)
def test_the_same_command_works_under_other_launchers(starter: tuple[str, ...], reference: list[int]) -> None:
    document = generate(before=starter)
    assert document["token_ids"] == reference
    assert len(document["ranks"]) == 2  # type: ignore[arg-type]


def test_each_rank_holds_only_its_own_weights_and_the_tied_table_is_held_twice() -> None:
    document = generate("-n", "2", "--split", "7,23")
    ranks: list[Document] = document["ranks"]  # type: ignore[assignment]
    assert [rank["layers"] for rank in ranks] == [[23, 30], [0, 23]]
    table, whole = 49152 * 576 * 4, 134_515_008 * 4
    assert sum(rank["weight_bytes"] for rank in ranks) <= 1.02 * (whole + table)  # type: ignore[misc]
    for rank in ranks:
        assert rank["peak_memory_bytes"] <= rank["weight_bytes"] + table + 200e6  # type: ignore[operator]


def test_the_layers_of_the_hostfile_are_those_of_the_ranks(tmp_path: Path) -> None:
    hosts = [
        {"ssh": "localhost", "ips": ["127.0.0.1"], "layers": [23, 30]},
        {"ssh": "127.0.0.1", "ips": ["127.0.0.2"], "layers": [0, 23]},
    ]
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    for backend in ("ring", "mpi"):
        document = generate("--hostfile", str(hostfile), "--backend", backend, "--max-tokens", "2")
        ranks: list[Document] = document["ranks"]  # type: ignore[assignment]
        assert [rank["layers"] for rank in ranks] == [[23, 30], [0, 23]]


def test_a_prompt_from_stdin_streams_plain_text_to_stdout(tmp_path: Path) -> None:
    result = lockstep("generate", "-n", "2", stdin="What is the capital of France?", cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert "Paris" in result.stdout
    assert result.stdout.endswith("\n")
    assert "layers 0-" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_ranks_do_not_wait_for_a_person_who_types(tmp_path: Path) -> None:
    """As if the prompt took longer to type than the ranks wait for each other."""
    typing = ("sh", "-c", '{ sleep 9; echo Hello; } | "$@"', "sh")
    options = ["generate", "-n", "2", "--max-tokens", "2"]
    result = lockstep(*options, before=typing, env={"LOCKSTEP_JOIN_TIMEOUT": "8"})
    assert result.status == 0, result.stderr


def test_text_that_the_terminal_cannot_show_is_written_as_far_as_it_can() -> None:
    options = ["generate", "Say exactly: é è ü ñ 日本", "--max-tokens", "12"]
    whole = lockstep(*options, env={"PYTHONIOENCODING": "utf-8"})
    ascii_only = lockstep(*options, env={"PYTHONIOENCODING": "ascii"})
    assert (whole.status, ascii_only.status) == (0, 0), ascii_only.stderr
    assert not whole.stdout.isascii()
    assert ascii_only.stdout == whole.stdout.encode("ascii", "replace").decode()


@pytest.mark.parametrize("ranks", [["-n", "1"], ["-n", "2"], ["-n", "2", "--backend", "mpi"]], ids=" ".join)
def test_a_full_disk_ends_the_run_with_one_line(ranks: list[str]) -> None:
    full = ("sh", "-c", 'exec "$@" > /dev/full', "sh")
    result = lockstep("generate", "Hello", *ranks, "--max-tokens", "2", before=full)
    assert (result.status, result.left) == (1, [])
    assert result.stderr.splitlines()[-1] == (
        "lockstep: error: cannot write to standard output: No space left on device"
    )


def test_a_stop_string_ends_the_text_before_it() -> None:
    result = lockstep("generate", "What is the capital of France?", "--stop", " Paris", "--json")
    document = json.loads(result.stdout)
    assert document["text"] == "The capital of France is"
    assert document["finish_reason"] == "stop"


def test_a_seed_gives_the_same_text_on_1_and_2_ranks() -> None:
    options = ["--temperature", "1", "--top-p", "0.9", "--seed", "7"]
    forms = [["-n", "1"], ["-n", "2"], ["-n", "2", "--parallel", "tensor"]]
    texts = [generate(*form, *options)["text"] for form in forms]
    assert texts[0] == texts[1] == texts[2]
    assert generate("--temperature", "1", "--top-p", "0.9", "--seed", "8")["text"] != texts[0]
