"""What a rank finds out from the variables of its launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.errors import UsageError
from lockstep.runtime.environment import RankEnvironment, is_rank


def test_without_variables_there_is_one_rank() -> None:
    assert not is_rank({})
    assert RankEnvironment.read({}) == RankEnvironment()


def test_what_our_launcher_says_is_taken() -> None:
    env = {
        "MLX_RANK": "2",
        "LOCKSTEP_WORLD_SIZE": "3",
        "LOCKSTEP_LOCAL_SIZE": "1",
        "LOCKSTEP_BACKEND": "nccl",
        "LOCKSTEP_ADDRESS": "10.0.0.1",
        "LOCKSTEP_MEMORY_GB": "1.5",
    }
    assert is_rank(env)
    assert RankEnvironment.read(env) == RankEnvironment(2, 3, 1, "nccl", ("10.0.0.1",), 1_500_000_000)


def test_under_mlx_launch_the_hostfile_tells_size_and_neighbours(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.2:5001"]]))
    read = RankEnvironment.read({"MLX_RANK": "1", "MLX_HOSTFILE": str(hostfile)})
    assert (read.rank, read.size, read.local_size, read.backend) == (1, 3, 2, "ring")
    assert read.addresses[0] == "10.0.0.1"


OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")


@pytest.mark.parametrize("names", [OPEN_MPI, MPICH])
def test_under_mpirun_its_own_variables_are_read(names: tuple[str, ...]) -> None:
    env = dict(zip(names, "142", strict=True))
    assert RankEnvironment.read(env) == RankEnvironment(1, 4, 2, "mpi")


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"MLX_RANK": "one", "LOCKSTEP_WORLD_SIZE": "2"}, "MLX_RANK"),
        ({"MLX_RANK": "0", "LOCKSTEP_BACKEND": "pigeon"}, "pigeon"),
        ({"MLX_RANK": "0"}, "LOCKSTEP_WORLD_SIZE"),
        ({"LOCKSTEP_MEMORY_GB": "8GB"}, "LOCKSTEP_MEMORY_GB='8GB' is no number of gigabytes"),
        ({"LOCKSTEP_MEMORY_GB": "inf"}, "LOCKSTEP_MEMORY_GB"),
        ({"LOCKSTEP_MEMORY_GB": "-1"}, "LOCKSTEP_MEMORY_GB"),
    ],
)
def test_variables_that_make_no_sense_are_refused(env: dict[str, str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        RankEnvironment.read(env)
