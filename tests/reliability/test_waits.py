"""Nothing blocks for ever: in each phase, a rank that never comes ends the others within their deadline."""

import re
import time
from pathlib import Path

import pytest

from ranks import run_ranks

DEADLINE_S = 6
PROGRAM = Path(__file__).parent / "never_comes.py"


def ending(phase, victim, checkpoint, backend="ring"):
    """The ranks' results and the seconds from the victim's last act to the end of all."""
    env = {f"LOCKSTEP_{name}_TIMEOUT": str(DEADLINE_S) for name in ("JOIN", "LOAD")}
    env |= {"LOCKSTEP_STEP_TIMEOUT": "1"}
    env |= {"PHASE": phase, "VICTIM": str(victim), "MODEL": str(checkpoint)}
    results = run_ranks([str(PROGRAM)], 2, backend, timeout_s=60, env=env)
    # On a slow machine the deadline may pass before the ranks have met.
    stopped = re.search(r"(?:stopped|began) at (\S+)\n*$", results[victim].stdout)
    assert stopped, results
    return results, time.monotonic() - float(stopped[1])


@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("start", 1),
        ("start", 0),
        ("introduce", 0),
        ("hello", 1),
        ("assign", 0),
        pytest.param("load", 0, marks=pytest.mark.slow),
        pytest.param("test", 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_never_comes_ends_all_ranks_within_the_deadline(phase, victim, checkpoint):
    results, seconds = ending(phase, victim, checkpoint)
    assert all(result.status != 0 for result in results), results
    # 5 s of margin in which the waiting rank names the silent one, 2 s for the end, and a slow machine.
    assert seconds < DEADLINE_S + 5 + 2 + 10, results


def test_a_rank_that_stays_away_while_loading_is_named(checkpoint):
    results, _ = ending("load", 1, checkpoint)
    assert "rank 1 did not load its layers in 6 s" in results[0].stderr
