"""Ranks over ssh, against a real sshd on the loopback interface with a key and a configuration of its own."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ranks import free_ports

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None,
    reason="sshd is not installed (Debian: apt install openssh-server openssh-client)",
)

RANK = "import os, sys, time, signal\nrank = int(os.environ['MLX_RANK'])\n"


@pytest.fixture(scope="module")
def ssh(tmp_path_factory) -> Iterator[list[str]]:
    """The ssh command that knows node0, node1, ... (this machine) and `closed`, where nobody listens."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    port, closed = free_ports(2)
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\n"
        "UsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    key = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key}")
    (folder / "config").write_text(
        f"Host closed\n  Port {closed}\n"
        "Host stranger\n  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n"
        f"Host nokey\n  IdentityFile {folder}/host\n"
        f"Host * !nokey\n  IdentityFile {folder}/user\n"
        f"Host *\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    log = folder / "log"
    server = subprocess.Popen([SSHD, "-D", "-f", folder / "sshd_config", "-E", log], start_new_session=True)
    deadline = time.monotonic() + 10
    while not listens(port):
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    yield ["ssh", "-F", str(folder / "config")]
    server.terminate()
    server.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def nodes(n: int) -> list[dict[str, object]]:
    return [{"ssh": f"node{i}", "ips": ["127.0.0.1"]} for i in range(n)]


def remote_ranks(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(token in word for word in words[2:3]) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def await_end(token: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while left := remote_ranks(token):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_ranks_over_ssh_have_our_folder_environment_and_input(launch, ssh, tmp_path):
    program = RANK + (
        "import json\n"
        "print(json.dumps([rank, sys.stdin.read(), os.getcwd(), os.environ['MORE'], os.environ['HF_HOME'],"
        " os.environ.get('TEST_MARK'), json.load(open(os.environ['MLX_HOSTFILE']))]))\n"
        "sys.stderr.write(f'note {rank}\\n')\n"
    )
    options = {
        "ssh": ssh,
        "hosts": nodes(2),
        "cwd": str(tmp_path),
        "port": 24567,
        "job_env": {"MORE": "it's"},
    }
    launched = launch(program, env={"HF_HOME": "/hf"}, **options)
    status, out, err = launched.finish(given="read me")
    assert status == 0, err
    table = [["127.0.0.1:24567"], ["127.0.0.1:24568"]]
    assert json.loads(out) == [0, "read me", str(tmp_path), "it's", "/hf", None, table]
    expected = json.dumps([1, "", str(tmp_path), "it's", "/hf", None, table])
    assert sorted(err.splitlines()) == [f"[rank 1 node1] {expected}", "[rank 1 node1] note 1", "note 0"]


def test_a_failing_rank_over_ssh_is_named_and_ends_the_others(launch, ssh):
    token = f"token_{os.getpid()}_fails"
    program = RANK + (
        f"{token} = signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if rank == 1: time.sleep(0.5); os.kill(os.getpid(), signal.SIGSEGV)\n"
        "time.sleep(60)\n"
    )
    launched = launch(program, hosts=nodes(2), ssh=ssh, port=24571)
    status, _, err = launched.finish()
    assert (status, err) == (139, "lockstep: error: rank 1 (host node1) was killed by SIGSEGV\n")
    await_end(token, 0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_remote_ranks_end_with_the_launcher(launch, ssh, number):
    token = f"token_{os.getpid()}_{number}"
    program = RANK + (
        f"{token} = signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('up', file=sys.stderr)\ntime.sleep(60)\n"
    )
    launched = launch(program, hosts=nodes(2), ssh=ssh, port=24581)
    launched.await_lines(2)
    assert len(remote_ranks(token)) == 2
    launched.process.send_signal(number)
    launched.process.wait(10)
    if number == signal.SIGINT:
        assert launched.process.returncode == 130
        await_end(token, 0.5)
    else:
        await_end(token, 5)
    launched.await_silence(1)


@pytest.mark.parametrize(
    ("host", "options", "reason"),
    [
        ("closed", {}, "cannot reach closed (ssh: connect to host 127.0.0.1 port"),
        ("stranger", {}, "(Host key verification failed.): run `ssh stranger` once and accept its key"),
        ("nokey", {}, "Permission denied (publickey"),
        ("node1", {"python": "/no/python"}, "cannot start /no/python on node1"),
    ],
)
def test_an_unreachable_host_is_one_line_with_the_remedy(launch, ssh, host, options, reason):
    hosts = [*nodes(1), {"ssh": host, "ips": ["127.0.0.1"]}]
    hosts = hosts if not options else hosts[1:]
    status, _, err = launch(RANK + "time.sleep(60)", hosts=hosts, ssh=ssh, port=24591, **options).finish()
    assert status not in (0, None)
    assert err.startswith("lockstep: error: ") and err.count("\n") == 1
    assert reason in err
