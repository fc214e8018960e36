import subprocess
import sys

import pytest

from lockstep.runtime.beats import ENVIRONMENT, Beat, encode
from ranks import SOURCE

PROGRAM = """
import os, time
from lockstep.runtime.beats import Beat
beat = Beat.read(os.environ)
beat(7)
with beat.meanwhile(9, at_most_s=float(os.environ["AT_MOST_S"])):
    time.sleep(1.5)
"""


def written(**env: str) -> bytes:
    env |= {"PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, timeout=30).stdout


def test_a_thread_makes_the_beats_while_the_main_thread_blocks_but_not_for_ever():
    found = written(AT_MOST_S="60", **{ENVIRONMENT: "1"})
    assert found.startswith(encode(7) + 2 * encode(9))
    assert written(AT_MOST_S="0.1", **{ENVIRONMENT: "1"}) == encode(7) + encode(9)


def test_nothing_is_written_where_no_beats_are_wanted():
    assert written(AT_MOST_S="60") == b""


@pytest.mark.timeout(30)
def test_a_pipe_that_is_not_read_does_not_hold_up_the_beats():
    program = "from lockstep.runtime.beats import Beat\nbeat = Beat(True)\nfor _ in range(100_000): beat()\n"
    env = {"PYTHONPATH": str(SOURCE)}
    with subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE) as process:
        assert process.wait(15) == 0


def test_the_environment_says_whether_beats_are_wanted():
    assert Beat.read({ENVIRONMENT: "1"}).wanted and not Beat.read({}).wanted
