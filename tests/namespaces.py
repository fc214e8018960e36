"""Two ranks with a network between them that can be broken: rank 1 lives in a namespace of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from cluster import Cluster

SSH = """#!/bin/sh
# Stands for ssh: its last argument is the command for the other machine.
for last; do :; done
exec ip netns exec {namespace} sh -c "$last"
"""


def unavailable() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} is not installed"
    name = f"try{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"ip netns add: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


class Link:
    """A pair of connected interfaces, one end in a namespace. Leave the `with` block to remove both."""

    def __init__(self) -> None:
        token = secrets.token_hex(3)
        self.namespace, self.here, self.there = f"ls{token}", f"lsa{token}", f"lsb{token}"
        net = 1 + secrets.randbelow(250)
        self.addresses = (f"10.231.{net}.1", f"10.231.{net}.2")
        self._healing: threading.Thread | None = None

    def __enter__(self) -> Link:
        _ip("netns", "add", self.namespace)
        _ip("link", "add", self.here, "type", "veth", "peer", "name", self.there, "netns", self.namespace)
        _ip("addr", "add", f"{self.addresses[0]}/24", "dev", self.here)
        _ip("link", "set", self.here, "up")
        inside = ("-n", self.namespace)
        _ip(*inside, "addr", "add", f"{self.addresses[1]}/24", "dev", self.there)
        for device in (self.there, "lo"):
            _ip(*inside, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        if self._healing is not None:
            self._healing.join()
        _ip("netns", "delete", self.namespace)

    def serve(self, folder: Path, model: Path, step_timeout_s: float) -> Cluster:
        """Rank 0 here, rank 1 beyond the link."""
        hosts = [
            {"ssh": "localhost", "ips": [self.addresses[0]]},
            {"ssh": "beyond", "ips": [self.addresses[1]]},
        ]
        hostfile = folder / f"{self.namespace}.json"
        hostfile.write_text(json.dumps(hosts))
        ssh = folder / self.namespace / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(SSH.format(namespace=self.namespace))
        ssh.chmod(0o755)
        env = {
            "PATH": os.pathsep.join([str(ssh.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "LOCKSTEP_STEP_TIMEOUT": str(step_timeout_s),
            "LOCKSTEP_JOIN_TIMEOUT": "15",
        }
        arguments = ("--hostfile", str(hostfile), "--model", str(model), "--restarts", "50")
        return Cluster(folder, *arguments, env=env)

    def down(self, seconds: float) -> None:
        """Take the link down; it is up again after `seconds`."""
        _ip("link", "set", self.here, "down")
        self._heal(seconds, "ip", "link", "set", self.here, "up")

    def drop(self, seconds: float) -> None:
        """Lose every packet, both ways, without anybody being told; for `seconds`."""
        inside = ["ip", "netns", "exec", self.namespace]
        rule = ["root", "pfifo", "limit", "0"]
        subprocess.run(["tc", "qdisc", "replace", "dev", self.here, *rule], check=True)
        subprocess.run([*inside, "tc", "qdisc", "replace", "dev", self.there, *rule], check=True)
        undo = f"tc qdisc del dev {self.here} root; {' '.join(inside)} tc qdisc del dev {self.there} root"
        self._heal(seconds, "sh", "-c", undo)

    def _heal(self, seconds: float, *command: str) -> None:
        def heal() -> None:
            time.sleep(seconds)
            subprocess.run(command, check=True)

        self._healing = threading.Thread(target=heal)
        self._healing.start()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
