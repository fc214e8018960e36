"""Host names: which is this machine, and the IPv4 address behind each (what every mlx backend takes)."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
import threading
import time
from collections.abc import Iterable


def is_local(ssh: str) -> bool:
    """Whether a hostfile's `ssh` name means this machine, so that no ssh is needed."""
    if ssh in ("localhost", "127.0.0.1", "::1"):
        return True
    own = socket.gethostname().lower().removesuffix(".local")
    return ssh.lower().removesuffix(".local") == own


def is_ipv6(name: str) -> bool:
    """Whether it is an IPv6 address, with a user before it and in brackets or not."""
    try:
        ipaddress.IPv6Address(name.rpartition("@")[2].strip("[]"))
    except ValueError:
        return False
    return True


def resolve(wanted: Iterable[str], timeout_s: float) -> dict[str, str]:
    """The IPv4 address of each name that has one; names without an answer in `timeout_s` are left out.

    All names are asked at once, ssh's aliases too. A resolver call cannot be interrupted, so each runs in a
    thread that is left behind when it is late.
    """
    found: dict[str, str] = {}

    def ask(name: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found[name] = _address(name, timeout_s)

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in set(wanted)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found)


def _address(name: str, timeout_s: float) -> str:
    with contextlib.suppress(OSError):
        return _lookup(name.rpartition("@")[2])
    return _lookup(_ssh_alias(name, timeout_s))


def _lookup(name: str) -> str:
    return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])


def _ssh_alias(name: str, timeout_s: float) -> str:
    """The machine behind a name that only ~/.ssh/config knows. Raises OSError where there is none."""
    try:
        shown = subprocess.run(
            ["ssh", "-G", "--", name],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"ssh -G {name} took more than {timeout_s} s") from error
    lines = (line.split(" ", 1) for line in shown.stdout.splitlines())
    settings = {parts[0]: parts[1] for parts in lines if len(parts) == 2}
    if settings.get("hostname", name) == name:
        raise OSError(f"{name} is not known to ssh")
    return settings["hostname"]
