"""What the supervisor does about a host that is gone; `ssh` is a script that runs the command here."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from cluster import Cluster, tiny_checkpoint

PROMPT = "the quick brown"
SSH = """#!/bin/sh
if [ -e {gone} ]; then echo "connect to host beyond port 22: No route to host" >&2; exit 255; fi
for last; do :; done
exec sh -c "$last"
"""


def test_a_host_that_stays_out_of_reach_is_left_out_and_the_streams_go_on(tmp_path):
    model, gone, ssh = tiny_checkpoint(tmp_path), tmp_path / "gone", tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(gone=gone))
    ssh.chmod(0o755)
    hostfile = tmp_path / "hosts.json"
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.1"]}, {"ssh": "beyond", "ips": ["127.0.0.2"]}]
    hostfile.write_text(json.dumps(hosts))
    path = os.pathsep.join([str(ssh.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    arguments = ("--hostfile", str(hostfile), "--model", str(model), "--restarts", "3")
    with Cluster(tmp_path, *arguments, env={"PATH": path}) as cluster:
        cluster.wait_ready()
        undisturbed = cluster.stream(PROMPT)
        undisturbed.join(60)
        stream = cluster.stream(PROMPT)
        while len(stream.arrived_s) < 10:
            assert not stream.error
            time.sleep(0.01)
        gone.touch()
        os.kill(cluster.pid(1), signal.SIGKILL)
        stream.join(90)
        assert (stream.error, stream.text) == ("", undisturbed.text)
        status = cluster.status()
        assert len(status["ranks"]) == 1
        assert "going on without beyond, with 1 ranks" in status["reason"]
        assert "cannot reach beyond" in cluster.output
