"""What MPI and mlx are told in a rank, whoever has started it."""

from __future__ import annotations

from pathlib import Path

from lockstep.runtime import libmpi


def test_the_library_of_the_prefix_is_named_unless_another_is(tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libmpi.so.40"
    prefix = {"OPAL_PREFIX": str(tmp_path)}
    for env, named in ((prefix, None), ({}, None)):
        libmpi.prepare(given := dict(env))
        assert given.get(libmpi.VARIABLE) == named
    library.parent.mkdir()
    library.touch()
    libmpi.prepare(found := dict(prefix))
    assert found[libmpi.VARIABLE] == str(library)
    libmpi.prepare(kept := prefix | {libmpi.VARIABLE: "/own"})
    assert kept[libmpi.VARIABLE] == "/own"


def test_mpi_is_asked_to_yield_and_to_take_threads_unless_somebody_has_said_otherwise() -> None:
    libmpi.prepare(env := {"OMPI_MCA_mpi_yield_when_idle": "0"})
    assert env["OMPI_MCA_mpi_yield_when_idle"] == "0"
    assert (env["OMPI_MPI_THREAD_LEVEL"], env["MPIR_CVAR_DEFAULT_THREAD_LEVEL"]) == (
        "3",
        "MPI_THREAD_MULTIPLE",
    )
