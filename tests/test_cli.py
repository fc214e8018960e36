"""Wrong input: one line that helps, the right exit status, no traceback, nothing left running."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import time
from pathlib import Path

import pytest

from command import Result, lockstep, through


def refused(result: Result, status: int, *words: str) -> None:
    """The command ended with `status` after exactly one line of complaint that holds `words`."""
    assert result.status == status, result.stderr
    assert "Traceback" not in result.stderr
    complaints = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert len(complaints) == 1, result.stderr
    for word in words:
        assert word in complaints[0], complaints[0]
    assert result.stdout == ""
    assert not result.left


def test_help_lists_the_commands() -> None:
    result = lockstep("--help")
    assert result.status == 0
    assert all(name in result.stdout for name in ("generate", "serve", "plan"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no/such/folder"], ["no/such/folder", "folder"]),
        (["-n", "31"], ["30 layers", "31", "between 1 and 30"]),
        (["-n", "2", "--split", "10,9"], ["adds up to 19", "30"]),
        (["-n", "2", "--split", "10,10,10"], ["3 ranks", "2"]),
        (["-n", "2", "--split", "half"], ["half", "10,9,9"]),
        (["-n", "257"], ["--ranks", "256"]),
        (["--backend", "carrier-pigeon"], ["carrier-pigeon", "ring"]),
        (["--parallel", "sideways"], ["sideways", "tensor"]),
        (["--env", "NOVALUE"], ["NOVALUE", "NAME=VALUE"]),
        (["-n", "2", "--env", os.fsdecode(b"A=\xff")], ["A=", "not UTF-8"]),
        (["--cwd", "/no/such/folder"], ["--cwd /no/such/folder"]),
        (["--python", "/no/such/python"], ["--python /no/such/python"]),
        (["--ring-port", "7"], ["--ring-port", "1024"]),
        (["--temperature", "inf"], ["--temperature", "2"]),
        (["--context", "1000000"], ["1000000", "8192"]),
        (["--hostfile", "/no/such/file"], ["/no/such/file"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_done_is_refused_before_anything_starts(
    arguments: list[str], words: list[str]
) -> None:
    began = time.monotonic()
    refused(lockstep("generate", "hello", *arguments), 2, *words)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--log-level", "loud"], ["loud", "warning"]),
        (["--log-format", "xml"], ["xml", "json"]),
        (["--ssl-keyfile", "/no/such/key"], ["/no/such/key", "--ssl-certfile"]),
        (["--ssl-certfile", "/no/such/certificate"], ["/no/such/certificate"]),
        (["--drain-timeout", "inf"], ["--drain-timeout", "1000000"]),
        (["--recovery-timeout", "nan"], ["--recovery-timeout", "1000000"]),
        (["--step-timeout", "1e9"], ["--step-timeout", "1000000"]),
        (["--min-ranks", "5", "-n", "2"], ["--min-ranks 5", "2 ranks"]),
        (["--host", "300.1.1.1", "--no-auth"], ["300.1.1.1", "--host"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    arguments: list[str], words: list[str]
) -> None:
    result = lockstep("serve", "--port", "0", *arguments, timeout_s=20)
    refused(result, 2, *words)
    assert "starting" not in result.stderr


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        result = lockstep("serve", "--port", port, timeout_s=20)
    refused(result, 2, port, "Address already in use", "--port")
    assert "starting" not in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--clients", "²"), ("--clients", "9" * 22), ("--prompt", "²"), ("--requests", "1001")],
)
def test_a_load_that_is_no_number_or_too_great_is_refused(option: str, value: str) -> None:
    refused(lockstep("bench", option, value), 2)


def test_one_rank_is_started_as_the_options_say() -> None:
    answer = lockstep("generate", "Hi", "--max-tokens", "1", "--env", "OPENBLAS_NUM_THREADS=2")
    assert answer.status == 0
    assert "2 threads" in answer.stderr


def test_wrong_usage_names_the_program_that_was_typed() -> None:
    result = lockstep("generate", "--no-such-option", env={"LOCKSTEP_PROGRAM": "./launch"})
    assert result.status == 2
    assert "Try './launch generate --help'" in result.stderr


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_folder_that_is_gone_is_told(tmp_path: Path, ranks: str) -> None:
    gone = ("sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh")
    refused(lockstep("generate", "Hi", "-n", ranks, before=gone, cwd=tmp_path), 2, "current folder")


def test_an_empty_prompt_is_refused() -> None:
    refused(lockstep("generate", "  "), 2, "prompt is empty")
    refused(lockstep("generate", "-n", "2", stdin=""), 2, "prompt is empty")


def test_a_closed_standard_input_is_an_empty_one() -> None:
    refused(lockstep("generate", "-n", "2", before=through("<&-")), 2, "prompt is empty")
    result = lockstep("chat", before=through("<&-"))
    assert (result.status, result.stdout) == (0, "> "), result.stderr


def test_a_prompt_that_is_no_text_is_refused() -> None:
    refused(lockstep("generate", os.fsdecode(b"Hi \xff")), 2, "not UTF-8", "character 4")
    refused(lockstep("generate", "-n", "2", stdin=b"\xff\xfe"), 2, "not UTF-8", "character 1")


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers() -> None:
    refused(lockstep("generate", "word " * 300, "--context", "128", "-n", "2"), 2, "331 tokens", "127")


def test_an_open_address_is_refused_before_any_rank_is_started() -> None:
    result = lockstep("serve", "--host", "0.0.0.0", "--port", "0")
    refused(result, 2, "0.0.0.0", "--no-auth")
    assert "starting" not in result.stderr


def test_a_broken_hostfile_is_refused_with_its_line(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text('[\n {"ssh": "a", "ips": ["127.0.0.1"]},\n {"ssh": ""}\n]')
    refused(lockstep("generate", "hello", "--hostfile", str(hostfile)), 2, "line 3", "ssh")


def test_an_unreachable_host_is_named(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ssh = tmp_path / "ssh"  # the real ssh, to a port where nobody listens
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -p {port} "$@"\n')
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    hostfile.write_text(
        json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}, {"ssh": "127.0.0.3", "ips": ["127.0.0.3"]}])
    )
    path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = lockstep("generate", "hello", "--hostfile", str(hostfile), env={"PATH": path})
    assert result.status != 0
    assert "127.0.0.3" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.left


def test_a_missing_libmpi_is_named_with_the_remedy() -> None:
    env = {"MLX_MPI_LIBNAME": "/no/libmpi.so"}
    result = lockstep("generate", "hello", "-n", "2", "--backend", "mpi", env=env)
    assert result.status in (1, 2)
    assert "MLX_MPI_LIBNAME" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.left


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    from lockstep.model import checkpoint

    source = checkpoint.resolve(None)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = next(source.glob("*.safetensors"))
    with weights.open("rb") as whole:
        (tmp_path / weights.name).write_bytes(whole.read(10_000_000))
    refused(lockstep("generate", "hello", "-n", "2", "--model", str(tmp_path)), 2, weights.name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCKSTEP_JOIN_TIMEOUT", "inf"),
        ("LOCKSTEP_LOAD_TIMEOUT", "-1"),
        ("LOCKSTEP_STEP_TIMEOUT", "soon"),
        ("LOCKSTEP_MEMORY_GB", "8GB"),
    ],
)
def test_a_variable_that_is_no_such_number_is_refused(name: str, value: str) -> None:
    refused(lockstep("generate", "hello", env={name: value}), 2, "LOCKSTEP_", value)


def test_plan_shows_every_rank_without_loading() -> None:
    result = lockstep("plan", "-n", "3")
    assert result.status == 0, result.stderr
    assert all(word in result.stdout for word in ("25-29", "12-24", "0-11", "equal split"))


def test_a_dry_run_starts_nothing_and_shows_every_rank() -> None:
    result = lockstep("generate", "hello", "-n", "2", "--dry-run")
    assert result.status == 0
    assert "rank 0" in result.stdout
    assert "rank 1" in result.stdout
    assert "MLX_HOSTFILE" in result.stdout
