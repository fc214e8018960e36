"""A stage goes on while a message of its own waits for the next stage, which has no time for it yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranks import run_ranks

PROGRAM = Path(__file__).parent.parent / "neighbours_program.py"


@pytest.mark.parametrize(("n", "backend"), [(2, "ring"), (2, "mpi"), (3, "mpi")])
def test_a_waiting_message_keeps_no_stage_from_receiving_and_computing(tmp_path: Path, n: int, backend: str):
    ranks = run_ranks([str(PROGRAM), backend, str(tmp_path)], n, backend)
    assert [rank.status for rank in ranks] == [0] * n, "".join(rank.stderr[-2000:] for rank in ranks)
