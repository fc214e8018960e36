"""The launcher with small Python programs as ranks: status, output, and that nothing is left behind."""

from __future__ import annotations

import ast
import json
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from lockstep.errors import LockstepError
from lockstep.launch import launcher
from lockstep.launch.agent import CANNOT_START
from lockstep.launch.hostfile import Host
from lockstep.launch.job import Job

RANK = "import os, sys, time, signal\nrank = int(os.environ['MLX_RANK'])\n"
STUBBORN = RANK + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
WAIT = "print('up', file=sys.stderr)\ntime.sleep(60)\n"


def test_rank_0_is_clean_and_gets_the_input_and_the_others_are_tagged(launch):
    program = RANK + "print(f'text {rank}', repr(sys.stdin.read()))\nsys.stderr.write(f'note {rank}\\n')\n"
    launched = launch(program, n=3)
    status, out, err = launched.finish(given="two\nlines")
    assert status == 0
    assert out == "text 0 'two\\nlines'\n"
    assert sorted(err.splitlines()) == [
        "[rank 1 localhost] note 1",
        "[rank 1 localhost] text 1 ''",
        "[rank 2 localhost] note 2",
        "[rank 2 localhost] text 2 ''",
        "note 0",
    ]


@pytest.mark.parametrize("redirection", ["<&-", "0>/dev/null"])
def test_a_standard_input_that_cannot_be_read_is_at_its_end(launch, redirection):
    through = ("sh", "-c", f'exec "$@" {redirection}', "sh")
    launched = launch(RANK + "if rank == 0: print(repr(sys.stdin.read()))\n", through=through)
    status, out, _ = launched.finish()
    assert (status, out) == (0, "''\n")


def test_text_of_rank_0_appears_before_its_line_ends(launch):
    launched = launch(RANK + "if rank == 0: print('Par', end='')\nsys.stdin.read()\n")
    assert launched.process.stdout.read(3) == "Par"
    launched.process.stdin.close()
    assert launched.process.wait(10) == 0


def test_a_failing_rank_ends_the_others_and_gives_its_status(launch):
    program = RANK + (
        "if rank == 2: print('the reason', file=sys.stderr); time.sleep(0.3); sys.exit(3)\ntime.sleep(60)\n"
    )
    launched = launch(program, n=3)
    assert launched.await_lines(1) == ["[rank 2 localhost] the reason\n"]
    began = time.monotonic()
    status, _, err = launched.finish()
    assert (status, err) == (3, "lockstep: error: rank 2 (host localhost) exited with status 3\n")
    assert time.monotonic() - began < 5
    launched.await_silence(0.5)


def test_the_exception_that_ended_a_rank_is_part_of_the_reason(launch):
    end = "try:\n        1 / 0\n    except ArithmeticError:\n        int('x')"
    status, _, err = launch(RANK + f"if rank == 1:\n    {end}\ntime.sleep(60)\n").finish()
    assert status == 1
    reason = "rank 1 (host localhost) exited with status 1: ValueError: invalid literal"
    assert err.splitlines()[-1].startswith(f"lockstep: error: {reason}")


def test_last_lines_are_shown_again_when_others_wrote_after_them(launch, tmp_path):
    program = RANK + (
        "if rank == 1:\n"
        "    sys.stderr.write('the reason\\n')\n"
        "    while not os.path.exists('said'): time.sleep(0.01)\n"
        "    sys.exit(4)\n"
        "if rank == 2: time.sleep(0.5); sys.stderr.write('chatter\\n'); open('said', 'w').close()\n"
        "time.sleep(60)\n"
    )
    status, _, err = launch(program, n=3, cwd=str(tmp_path)).finish()
    assert status == 4
    assert err.splitlines()[-3:] == [
        "last lines of rank 1:",
        "[rank 1 localhost] the reason",
        "lockstep: error: rank 1 (host localhost) exited with status 4",
    ]


def test_a_killed_rank_is_named_and_ranks_that_ignore_sigterm_end_too(launch):
    program = STUBBORN + (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "if rank == 1: sys.stderr.write('now\\n'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    launched = launch(program)
    launched.await_lines(1)
    began = time.monotonic()
    status, _, err = launched.finish()
    assert time.monotonic() - began < 5
    assert (status, err) == (137, "lockstep: error: rank 1 (host localhost) was killed by SIGKILL\n")
    launched.await_silence(0.5)


def test_a_stopped_rank_ends_too(launch):
    launched = launch(RANK + "if rank: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(0.3); sys.exit(5)\n")
    assert launched.finish()[0] == 5
    launched.await_silence(0.5)


def test_a_rank_that_does_not_end_after_rank_0_is_named_and_ended(launch):
    launched = launch(RANK + "if rank: os.kill(os.getpid(), signal.SIGSTOP)\nprint('the answer')\n")
    said = "lockstep: rank 1 (host localhost) did not end within 10 s after rank 0: ended now\n"
    assert launched.finish(timeout_s=50) == (0, "the answer\n", said)
    launched.await_silence(0.5)


@pytest.mark.parametrize(
    ("victim", "cause"), [("sys.exit(75)", "sys.exit(7)"), ("1/0", "os.kill(os.getpid(), 9)")]
)
def test_the_cause_is_named_although_a_consequence_ended_first(launch, tmp_path, victim, cause):
    program = RANK + (
        f"if rank == 0:\n    open('going', 'w').close()\n    {victim}\n"
        f"while not os.path.exists('going'): time.sleep(0.01)\ntime.sleep(0.1)\n{cause}\n"
    )
    status, _, err = launch(program, stdin=False, cwd=str(tmp_path)).finish()
    assert status in (7, 137)
    assert "rank 1 (host localhost)" in err.splitlines()[-1]


def test_a_rank_that_ended_well_is_to_blame_although_its_victim_was_heard_of_first(launch, tmp_path):
    program = RANK + (
        "if rank == 0: open('going', 'w').close(); sys.exit(75)\n"
        "while not os.path.exists('going'): time.sleep(0.01)\ntime.sleep(0.4)\n"
    )
    status, _, err = launch(program, stdin=False, cwd=str(tmp_path)).finish()
    assert (status, err) == (1, "lockstep: error: rank 1 (host localhost) ended before the others\n")


def test_what_rank_0_explains_itself_is_not_said_twice(launch):
    program = (
        RANK + "if rank: time.sleep(60)\nsys.exit(print('lockstep: error: no model', file=sys.stderr) or 2)\n"
    )
    status, _, err = launch(program).finish()
    assert (status, err) == (2, "lockstep: error: no model\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_rank(launch, number):
    launched = launch(STUBBORN + WAIT)
    launched.await_lines(2)
    launched.process.send_signal(number)
    status, _, err = launched.finish()
    assert status == 128 + number
    assert "Traceback" not in err
    launched.await_silence(0.5)


def test_nothing_outlives_a_launcher_that_is_killed(launch):
    launched = launch(STUBBORN + "import subprocess\nsubprocess.Popen(['sleep', '60'])\n" + WAIT)
    launched.await_lines(2)
    launched.await_members(7)  # The launcher, and per rank: its agent, itself and its child.
    launched.process.kill()
    launched.await_silence(5)


def test_a_rank_that_watches_its_lifeline_ends_with_its_agent(launch, tmp_path):
    program = RANK + "from lockstep.launch import lifeline\nlifeline.watch()\n" + WAIT
    # A killed agent cannot remove its folder.
    launched = launch(program, env={"TMPDIR": str(tmp_path)})
    launched.await_lines(2)
    agents = psutil.Process(launched.process.pid).children()
    for agent in agents:
        agent.kill()
    launched.await_silence(3)


def test_a_waiting_launcher_uses_no_cpu(launch):
    launched = launch(RANK + WAIT)
    launched.await_lines(2)
    time.sleep(0.2)
    processes = [psutil.Process(launched.process.pid), *psutil.Process(launched.process.pid).children()]

    def used() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in processes)

    before, seconds = used(), 4.0
    time.sleep(seconds)
    assert (used() - before) / seconds < 0.01


def test_a_reader_that_goes_away_ends_the_run(launch):
    launched = launch(RANK + "while rank == 0: print('x' * 1000)\ntime.sleep(60)\n")
    launched.process.stdout.read(10)
    launched.process.stdout.close()
    assert launched.process.wait(10) != 0
    launched.await_silence(3)


def test_a_reader_who_pauses_delays_no_rank_and_is_told_what_he_has_missed(launch, tmp_path):
    program = RANK + (
        "if rank:\n"
        "    for _ in range(90000): sys.stderr.write('x' * 99 + '\\n')\n"
        "    sys.exit(open('through', 'w').close())\n"
        "while not os.path.exists('through'): time.sleep(0.01)\n"
        "print('done')\n"
    )
    launched = launch(program, stdin=False, cwd=str(tmp_path))
    assert launched.process.stdout.readline() == "done\n"  # Until here, nobody has read standard error.
    status, _, err = launched.finish()
    *lines, note = err.splitlines()
    assert status == 0
    assert set(lines) == {"[rank 1 localhost] " + "x" * 99}
    assert note == f"lockstep: left out {90000 - len(lines)} lines here, which nobody had read in time"


def test_text_of_a_rank_0_elsewhere_waits_for_a_reader_who_pauses(launch, tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    hosts = [{"ssh": "beyond", "ips": ["127.0.0.1"]}]
    program = RANK + "sys.stdout.write('x' * 150000)\nsys.stdout.flush()\nos.close(1)\n"
    launched = launch(program, hosts=hosts, ssh=[str(ssh)], stdin=False)
    time.sleep(4)  # By now, the rank has long ended.
    status, out, err = launched.finish()
    assert (status, len(out), err) == (0, 150000, "")


def test_a_line_without_an_end_that_nobody_reads_keeps_no_one(launch):
    launched = launch(RANK + "if rank: time.sleep(0.5); sys.stderr.write('no end')\n")
    launched.process.stderr.close()
    assert launched.process.wait(10) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("heard", [True, False])
def test_ranks_go_on_although_their_output_cannot_be_written(launch, heard):
    program = RANK + "for _ in range(2000): sys.stderr.write('x' * 99 + '\\n')\nprint('done')\n"
    full = ("sh", "-c", 'exec "$@" 2>/dev/full', "sh")
    # A rank that is not heard writes there by itself.
    program = program if heard else program.replace("for", "if rank:\n  for")
    launched = launch(program, through=full, heard=heard)
    assert launched.finish()[:2] == (0, "done\n")


def test_a_signal_that_nohup_has_us_ignore_ends_nobody(launch):
    launched = launch(RANK + WAIT, through=("nohup",))
    launched.await_lines(2)
    for process in launched.members():
        process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert launched.process.poll() is None
    launched.await_members(5)  # The launcher, and per rank: its agent and itself.
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish()[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("start", [launcher.run, launcher.start])
def test_a_missing_ssh_is_named_and_nothing_stays_behind(start):
    hosts = (Host("localhost", ("10.0.0.1",)), Host("beyond", ("10.0.0.2",)))
    before = psutil.Process().children()
    with pytest.raises(
        LockstepError, match=r"^cannot start /no/ssh: No such file .*: install an ssh client$"
    ):
        start(Job(("-c", "import time; time.sleep(60)"), hosts, stdin=False, ssh=("/no/ssh",)))
    assert psutil.Process().children() == before


def test_a_python_that_is_too_old_is_named(launch, tmp_path):
    ssh, python = tmp_path / "ssh", tmp_path / "python"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    python.write_text(
        f"#!/bin/sh\nexec {sys.executable} -I -S -c "
        "\"import sys; sys.version_info = (3, 9, 6, 'final', 0); $4\"\n"
    )
    for script in (ssh, python):
        script.chmod(0o755)
    hosts = [{"ssh": "beyond", "ips": ["127.0.0.1"]}]
    status, out, err = launch(RANK, hosts=hosts, ssh=[str(ssh)], python=str(python)).finish()
    assert (status, out) == (CANNOT_START, "")
    where = f"{sys.executable} on {socket.gethostname()}"
    assert err == (
        f"lockstep: error: Python 3.9.6 at {where} is older than 3.11: give another with --python\n"
    )


def test_an_old_python_can_read_the_agent():
    agent = Path(launcher.__file__).with_name("agent.py")
    ast.parse(agent.read_text(), feature_version=(3, 8))


def test_a_port_in_use_is_named(launch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = launch(RANK + WAIT, port=port).finish()
    assert status == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another --ring-port" in err


def test_a_missing_folder_and_a_missing_python_are_named(launch, tmp_path):
    status, _, err = launch(RANK, n=1, cwd=str(tmp_path / "none")).finish()
    assert status == 1 and f"the folder {tmp_path}/none does not exist on" in err
    status, _, err = launch(RANK, n=1, python="/no/python").finish()
    assert status == 127 and "cannot start /no/python: No such file or directory" in err


def test_ranks_see_what_mlx_and_the_runtime_need(launch):
    program = RANK + (
        "import json\n"
        "seen = {n: v for n, v in os.environ.items() if n.startswith(('LOCKSTEP_', 'MLX_', 'MORE'))}\n"
        "hosts = json.load(open(seen.pop('MLX_HOSTFILE')))\n"
        "print(json.dumps([seen, hosts, os.getcwd()]))\n"
    )
    stale = {"MLX_IBV_DEVICES": "stale", "MLX_RANK": "7", "MLX_METAL_FAST_SYNCH": "1", "MORE": "no"}
    status, out, err = launch(program, env=stale, job_env={"MORE": "yes"}, cwd="/", port=20123).finish()
    assert status == 0, err
    seen, hosts, folder = json.loads(out)
    assert folder == "/"
    assert hosts == [["127.0.0.1:20123"], ["127.0.0.1:20124"]]
    assert seen.pop("LOCKSTEP_LIFELINE_FD").isdigit()
    assert seen == {
        "MORE": "yes",
        "MLX_RANK": "0",
        "MLX_METAL_FAST_SYNCH": "1",
        "LOCKSTEP_ADDRESS": "127.0.0.1",
        "LOCKSTEP_BACKEND": "ring",
        "LOCKSTEP_LOCAL_SIZE": "2",
        "LOCKSTEP_WORLD_SIZE": "2",
    }
