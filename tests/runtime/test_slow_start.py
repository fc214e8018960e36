"""A rank that is slow to download or to load is waited for as long as loading may take, and no longer."""

from __future__ import annotations

import pytest

from cluster import tiny_checkpoint
from ranks import RankResult, free_ports, run_ranks

ALONE = """
import os, sys, threading
from pathlib import Path
from lockstep.model import default_model

def download():
    print(*[thread.name for thread in threading.enumerate()], file=sys.stderr)
    return Path(os.environ["MODEL"])

default_model.folder = download
sys.argv = ["lockstep", "generate", "hello", "--max-tokens", "2"]
from lockstep.cli import main
main()
"""

RANKS = """
import os, sys, time
from lockstep.runtime.options import Deadlines, ModelOptions
from lockstep.runtime.place import Place

place = Place.take(Deadlines())
from lockstep.cli.terminal import complain
from lockstep.errors import LockstepError
from lockstep.model import checkpoint
from lockstep.runtime import opening

# What the imports took does not count.
join_s, load_s, seconds, rank = map(float, sys.argv[2:])
place.watchdog.deadlines = Deadlines(join_s, load_s, step_s=2)
opening.TEST_STEPS, opening.MARGIN_S = 1, 1.0

def slow(act):
    def slowly(*arguments):
        time.sleep(seconds if place.env.rank == rank else 0)
        return act(*arguments)
    return slowly

where, name = {"download": (checkpoint, "resolve"), "load": (opening, "_load")}[sys.argv[1]]
setattr(where, name, slow(getattr(where, name)))
options = ModelOptions(os.environ["MODEL"], self_test=True)
try:
    opened = opening.open_session(place, options, lambda text: None)
except LockstepError as error:
    complain(str(error))
    os._exit(error.exit_status)
if opened.world.leader is not None:
    opened.world.leader.stop()
if opened.world.follower is not None:
    opened.world.follower.receive(10)
opened.close()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def ending(
    slow: str, join_s: float, load_s: float, seconds: float, rank: int, model: str
) -> list[RankResult]:
    """How two ranks end of which one takes `seconds` more to download or to load its model."""
    numbers = map(str, (join_s, load_s, seconds, rank))
    return run_ranks(["-c", RANKS, slow, *numbers], 2, env={"MODEL": model})


def test_no_watchdog_runs_yet_while_the_only_rank_downloads_its_model(model: str) -> None:
    [result] = run_ranks(ALONE, 1, env={"MODEL": model})
    assert result.status == 0, result
    assert result.stderr.splitlines()[0].split() == ["MainThread"]


@pytest.mark.parametrize("slow", [0, 1])
def test_a_download_may_take_longer_than_joining(slow: int, model: str) -> None:
    results = ending("download", 5, 60, 8, slow, model)
    assert [result.status for result in results] == [0, 0], results


def test_a_rank_whose_download_takes_too_long_is_named(model: str) -> None:
    results = ending("download", 60, 3, 60, 1, model)
    assert all(result.status for result in results), results
    assert "rank 1 did not find its model in 3 s" in results[0].stderr


def test_the_self_test_waits_for_the_rank_that_loads_last(model: str) -> None:
    results = ending("load", 60, 60, 7, 0, model)
    assert [result.status for result in results] == [0, 0], results


def test_all_ranks_end_with_the_front_process_that_rank_0_has_started(model: str) -> None:
    """As under bare mpirun or mlx.launch, where nobody else looks after it."""
    [port] = free_ports(1)
    serve = ["-m", "lockstep", "serve", "--model", model, "--host", "0.0.0.0", "--port", str(port)]
    results = run_ranks(serve, 2)
    assert [result.status for result in results] == [2, 0], results
    assert "--no-auth" in results[0].stderr
    assert "the front process ended with status 2" in results[0].stderr.splitlines()[-1]
