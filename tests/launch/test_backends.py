"""What each backend's ranks are given. jaccl and nccl cannot run here: this is how they are tested."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lockstep.errors import LockstepError, UsageError
from lockstep.launch import backends, mpi
from lockstep.launch.hostfile import Host, local_hosts
from lockstep.launch.job import Job
from lockstep.launch.launcher import dry_run

MACS = tuple(
    Host(f"mac{i}", (f"10.0.0.{i + 1}",), tuple(None if i == j else f"rdma_en{j}" for j in range(3)))
    for i in range(3)
)
ARGV = ("-m", "lockstep", "generate", "Hi there")


def job(backend: str, hosts: tuple[Host, ...] = MACS, **options: object) -> Job:
    return Job(ARGV, hosts, backend, cwd="/models", python="/venv/bin/python", **options)


def test_ring_gives_each_address_its_own_port():
    hosts = (replace(MACS[0], ips=("10.0.0.1", "10.0.1.1"), memory_gb=12.5), MACS[1])
    first, second = backends.commands(job("ring", hosts, env={"A": "b"}))
    table = [["10.0.0.1:32323", "10.0.1.1:32324"], ["10.0.0.2:32325"]]
    assert json.loads(first.files["MLX_HOSTFILE"]) == table == json.loads(second.files["MLX_HOSTFILE"])
    assert first.ports == (("10.0.0.1", 32323), ("10.0.1.1", 32324))
    assert first.remote and first.argv == ("/venv/bin/python", *ARGV)
    assert first.env["LOCKSTEP_MEMORY_GB"] == "12.5" and "LOCKSTEP_MEMORY_GB" not in second.env
    assert [command.env["MLX_RANK"] for command in (first, second)] == ["0", "1"]
    assert second.env["A"] == "b"
    assert second.env["LOCKSTEP_ADDRESS"] == "10.0.0.1"


def test_one_rank_needs_no_backend():
    (only,) = backends.commands(job("ring", local_hosts(1)))
    assert (only.files, only.ports, only.env["LOCKSTEP_WORLD_SIZE"]) == ({}, (), "1")


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_jaccl_gets_the_device_matrix_and_the_coordinator(backend):
    commands = backends.commands(job(backend, port=5000))
    for rank, command in enumerate(commands):
        assert json.loads(command.files["MLX_IBV_DEVICES"]) == [
            [None, "rdma_en1", "rdma_en2"],
            ["rdma_en0", None, "rdma_en2"],
            ["rdma_en0", "rdma_en1", None],
        ]
        assert command.env["MLX_JACCL_COORDINATOR"] == "10.0.0.1:5000"
        assert command.env["MLX_RANK"] == str(rank)
        assert command.env.get("MLX_JACCL_RING") == ("1" if backend == "jaccl-ring" else None)
    assert [command.ports for command in commands] == [(("10.0.0.1", 5000),), (), ()]


def test_jaccl_ring_needs_only_its_neighbours():
    hosts = tuple(Host(f"m{i}", (f"10.0.0.{i}",), tuple(devices)) for i, devices in enumerate((
        (None, "a", None, "b"), ("a", None, "b", None), (None, "a", None, "b"), ("a", None, "b", None),
    )))  # fmt: skip
    assert len(backends.commands(job("jaccl-ring", hosts))) == 4
    with pytest.raises(UsageError, match='an RDMA device from m0 to m2: its "rdma" is null at position 2'):
        backends.commands(job("jaccl", hosts))


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ((replace(MACS[0], rdma=()), *MACS[1:]), '"rdma" with 3 entries for mac0, found 0'),
        ((replace(MACS[0], rdma=("x", "y", "z")), *MACS[1:]), "must be null at its own position 0"),
        ((*MACS[:2], replace(MACS[2], ips=())), "needs an address of mac2"),
        ((*MACS[:2], replace(MACS[2], ips=("127.0.0.1",))), "mac2 has the address 127.0.0.1, which other"),
    ],
)
def test_jaccl_says_what_the_hosts_lack(hosts, reason):
    with pytest.raises(UsageError, match=reason):
        backends.commands(job("jaccl", hosts))


def test_nccl_gives_each_rank_of_a_host_its_own_gpu():
    hosts = (Host("gpu1", ("10.0.0.1",)), Host("gpu1", ("10.0.0.1",)), Host("gpu2", ("10.0.0.2",)))
    commands = backends.commands(job("nccl", hosts, port=4000))
    expected = {"NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "4000", "MLX_WORLD_SIZE": "3"}
    for command in commands:
        assert expected.items() <= command.env.items()
    assert [command.env["CUDA_VISIBLE_DEVICES"] for command in commands] == ["0", "1", "0"]
    assert [command.env["LOCKSTEP_LOCAL_SIZE"] for command in commands] == ["2", "2", "1"]


def test_nccl_takes_only_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    commands = backends.commands(job("nccl", local_hosts(2)))
    assert [command.env["CUDA_VISIBLE_DEVICES"] for command in commands] == ["5", "7"]
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=5,7 has 2"):
        backends.commands(job("nccl", local_hosts(3)))


VERSIONS = {
    "openmpi4": "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/",
    "openmpi5": "mpirun (Open MPI) 5.0.11\n",
    "mpich": "HYDRA build details:\n    Version:                                 4.0.2\n    CC: gcc\n",
    "other": "srun 23",
}


@pytest.fixture
def mpirun(tmp_path):
    """A made-up mpirun that only tells its version, with its library beside it."""

    def make(kind: str, library: str = "libmpi.so.40") -> str:
        for folder in ("bin", "lib"):
            (tmp_path / folder).mkdir()
        script = tmp_path / "bin" / "mpirun"
        script.write_text(f"#!/bin/sh\ncat <<'X'\n{VERSIONS[kind]}\nX\n")
        script.chmod(0o755)
        if library:
            (tmp_path / "lib" / library).touch()
        return str(script)

    return make


@pytest.mark.parametrize(
    ("kind", "options", "exporting"),
    [
        ("openmpi4", "--oversubscribe --bind-to none --wdir /models", "-x"),
        ("openmpi5", "--map-by :OVERSUBSCRIBE --bind-to none --output :raw --wdir /models", "-x"),
        ("mpich", "-wdir /models", "-genvlist"),
    ],
)
def test_mpirun_gets_the_arguments_of_its_maker(mpirun, tmp_path, kind, options, exporting):
    path = mpirun(kind)
    program = ("/venv/bin/python", "-m", "lockstep.launch.mpi_rank", "/venv/bin/python", *ARGV)
    (here,) = backends.commands(job("mpi", local_hosts(2), mpirun=path))
    assert here.argv == (path, "-n", "2", *options.split(), *program)
    assert here.env["MLX_MPI_LIBNAME"] == str(tmp_path / "lib" / "libmpi.so.40")
    (there,) = backends.commands(job("mpi", (MACS[0], MACS[0], MACS[1]), mpirun=path, stdin=False))
    hosts = "-hosts" if kind == "mpich" else "--host"
    assert there.argv[:5] == (path, "-n", "3", hosts, "mac0:2,mac1:1")
    assert exporting in there.argv and any("LOCKSTEP_WORLD_SIZE" in part for part in there.argv)
    assert there.argv[-len(program) :] == program
    assert not any("LOCKSTEP_STDIN_FIFO" in part for part in there.argv)  # Open MPI warns of what is not set.
    (read,) = backends.commands(job("mpi", (replace(MACS[0], ssh="localhost"), MACS[1]), mpirun=path))
    assert any("LOCKSTEP_STDIN_FIFO" in part for part in read.argv)


def test_mpi_refuses_addresses_that_other_machines_cannot_reach(mpirun):
    path, here = mpirun("openmpi5"), Host("localhost", ("127.0.0.1",))
    for hosts, reason in (
        ((here, MACS[1]), "localhost has the address 127.0.0.1, which other machines cannot reach"),
        ((MACS[0], replace(MACS[1], ips=())), "mpi needs an address of mac1"),
    ):
        with pytest.raises(UsageError, match=reason):
            backends.commands(job("mpi", hosts, mpirun=path, stdin=False))
    nameless = tuple(replace(host, ips=()) for host in MACS)
    (command,) = backends.commands(job("mpi", nameless, mpirun=path, stdin=False))
    assert "LOCKSTEP_ADDRESS" not in command.env


@pytest.mark.parametrize("stdin", [True, b"a prompt"])
def test_mpi_refuses_input_for_another_machine(mpirun, stdin):
    path = mpirun("openmpi5")
    with pytest.raises(
        UsageError, match="cannot hand our standard input to rank 0 on mac0: make this machine"
    ):
        backends.commands(job("mpi", mpirun=path, stdin=stdin))
    assert backends.commands(job("mpi", mpirun=path, stdin=b""))


def test_what_mpi_lacks_is_said_with_the_remedy(mpirun, tmp_path):
    with pytest.raises(LockstepError, match=r"/no/mpirun not found: install one with `pip install"):
        backends.commands(job("mpi", mpirun="/no/mpirun", stdin=False))
    path = mpirun("mpich", library="")
    with pytest.raises(LockstepError, match="no libmpi beside .*: set MLX_MPI_LIBNAME"):
        backends.commands(job("mpi", mpirun=path, stdin=False))
    with pytest.raises(LockstepError, match="neither Open MPI nor MPICH .it says 'srun 23'"):
        mpi.flavour("x", VERSIONS["other"])
    (tmp_path / "lib" / "libmpi.so.12").touch()
    with pytest.raises(UsageError, match="put the entries of mac0 together"):
        backends.commands(job("mpi", (MACS[0], MACS[1], MACS[0]), mpirun=path, stdin=False))


def test_a_dry_run_shows_everything_but_secrets():
    text = dry_run(job("jaccl", env={"HF_TOKEN": "hunter2", "A": "b"}, port=5000))
    assert "hunter2" not in text
    for part in (
        "rank 2 on mac2",
        "ssh -T -o BatchMode=yes -o ConnectTimeout=10",
        "folder: /models",
        "command: /venv/bin/python -m lockstep generate 'Hi there'",
        "env: MLX_RANK=2",
        "env: MLX_JACCL_COORDINATOR=10.0.0.1:5000",
        "env: HF_TOKEN=***",
        'file: MLX_IBV_DEVICES: [[null, "rdma_en1", "rdma_en2"]',
        "listens on: 10.0.0.1:5000",
    ):
        assert part in text


def test_bad_jobs_are_refused():
    with pytest.raises(UsageError, match="no hosts"):
        backends.commands(job("ring", ()))
    with pytest.raises(UsageError, match="unknown backend 'tcp'"):
        backends.commands(job("tcp"))
    with pytest.raises(UsageError, match="--ring-port 65535 leaves no room for 3 ports: use 1024"):
        backends.commands(job("ring", port=65535))


def test_ports_below_1024_are_left_to_the_system():
    with pytest.raises(UsageError, match="--ring-port 7 leaves no room for 3 ports: use 1024 to 65533"):
        backends.commands(job("ring", port=7))


def test_too_few_free_ports_are_told_with_the_numbers(monkeypatch):
    monkeypatch.setattr(backends.random, "sample", lambda numbers, count: [])
    with pytest.raises(LockstepError, match="of the 2 ports that are needed, 0 are free: give --ring-port"):
        backends.commands(job("ring", local_hosts(2)))
