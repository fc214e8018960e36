"""A rank that has to end does so, whatever has become of its output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranks import base_env

BUG = """
import threading, time
from lockstep.runtime.rank import end_together
end_together()
threading.Thread(target=time.sleep, args=(300,)).start()  # As the backend's, which nobody ends.
raise RuntimeError("a bug")
"""

LATE = """
import time
from lockstep.runtime.options import Deadlines
from lockstep.runtime.watchdog import Watchdog
watchdog = Watchdog({rank}, Deadlines(join_s=0.5))
time.sleep(300)
"""

BROKEN = """
import time
from lockstep.runtime.options import Deadlines
from lockstep.runtime.watchdog import Watchdog
watchdog = Watchdog(0, Deadlines())
watchdog.measure = None
time.sleep(300)
"""

WORDS = {
    BUG: "RuntimeError: a bug\n",
    LATE.format(rank=0): "has been stuck for \\d+ s while starting\n",
    LATE.format(rank=1): "has been starting for \\d+ s and gives up\n",
    BROKEN: "lockstep: error: the watchdog of rank 0 failed\n",
}


@pytest.fixture(params=["gone", "paused", "full"])
def unread(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor to write to that nobody reads."""
    if request.param == "full":
        if not Path("/dev/full").exists():
            pytest.skip("/dev/full is Linux's")
        ours, theirs = os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)
    else:
        ours, theirs = os.pipe()
    if request.param == "gone":
        os.close(ours)
    if request.param == "paused":
        os.set_blocking(theirs, False)
        while True:
            try:
                os.write(theirs, b"x" * 512)
            except BlockingIOError:
                break
        os.set_blocking(theirs, True)
    yield theirs
    os.close(theirs)
    if request.param != "gone":
        os.close(ours)


@pytest.mark.parametrize("program", WORDS, ids=["exception", "rank 0 late", "rank 1 late", "watchdog"])
def test_a_rank_ends_although_its_last_words_are_not_read(program: str, unread: int) -> None:
    done = subprocess.run([sys.executable, "-c", program], stderr=unread, env=base_env(2), timeout=60)
    assert done.returncode == 1


@pytest.mark.parametrize("program", WORDS, ids=["exception", "rank 0 late", "rank 1 late", "watchdog"])
def test_a_rank_says_why_it_ends(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=base_env(2), timeout=60)
    assert done.returncode == 1
    assert re.search(WORDS[program], done.stderr.decode())


def test_an_exception_does_not_wait_for_a_standard_output_that_is_not_read(unread: int) -> None:
    program = BUG.replace("raise", "import sys; sys.stdout.write('text')\nraise")
    env = base_env(2) | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=unread, stderr=subprocess.PIPE, env=env, timeout=60
    )
    assert (done.returncode, WORDS[BUG] in done.stderr.decode()) == (1, True)
