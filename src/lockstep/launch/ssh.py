"""The command that reaches another machine, and what its failures mean."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lockstep.launch.job import Job

FAILED = 255
"""ssh's own status when the connection is what failed."""

CONNECT_TIMEOUT_S = 10

_REMEDIES = (
    ("permission denied", "put your key there with `ssh-copy-id {host}`"),
    ("host key verification failed", "run `ssh {host}` once and accept its key"),
    ("remote host identification has changed", "check why, then `ssh-keygen -R {host}`"),
    ("could not resolve", "check the name in the hostfile"),
    ("timed out", "is the machine on and on this network?"),
    ("no route", "is the machine on and on this network?"),
    ("refused", "switch on its ssh server (macOS: Remote Login)"),
)


def argv(job: Job, host: str, remote: Sequence[str]) -> list[str]:
    """`remote` on `host`. Never asks for a password; notices a dead connection within 15 s."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(CONNECT_TIMEOUT_S),
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "LogLevel": "ERROR",
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return [*job.ssh, "-T", *flags, "--", host, f"exec {shlex.join(remote)}"]


def explain(host: str, status: int, said: Sequence[str], python: str) -> str:
    """One line on why no agent answered from `host`: ssh's own reason and the remedy."""
    lines = [line.strip() for line in said if line.strip(" \r\n@")]
    reason = lines[-1] if lines else f"ssh exited with status {status}"
    if status != FAILED:
        return f"cannot start {python} on {host} ({reason}): give the right one with --python"
    everything = " ".join(lines).lower()
    remedy = next((remedy for mark, remedy in _REMEDIES if mark in everything), "try `ssh {host}`")
    return f"cannot reach {host} ({reason}): {remedy.format(host=host)}"
