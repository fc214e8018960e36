"""A link with a delay between two network namespaces, for kernels without netem. Root only.

    delay_link.py DELAY_MS JITTER_MS NAMESPACE ADDRESS NAMESPACE ADDRESS

Makes a TUN device in each namespace and carries their packets over, in order, each after its delay. Says
"ready", and works until it is ended.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 9000


def make(name: str, namespace: str, address: str) -> int:
    """The device's descriptor; it stays ours when the device moves."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    for command in (
        f"ip link set {name} netns {namespace}",
        f"ip -n {namespace} addr add {address}/24 dev {name}",
        f"ip -n {namespace} link set {name} mtu {MTU} up",
    ):
        subprocess.run(command.split(), check=True, timeout=20)
    return fd


def carry(fds: list[int], delay_s: float, jitter_s: float) -> None:
    """From each device to the other, for ever."""
    waiting: dict[int, deque[tuple[float, bytes]]] = {fd: deque() for fd in fds}
    other = {fds[0]: fds[1], fds[1]: fds[0]}
    while True:
        due = [packets[0][0] for packets in waiting.values() if packets]
        timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
        for fd in select.select(fds, [], [], timeout_s)[0]:
            packets = waiting[other[fd]]
            when_s = time.monotonic() + max(0.0, random.gauss(delay_s, jitter_s))
            # A packet never overtakes the one before it.
            packets.append((max(when_s, packets[-1][0] if packets else 0.0), os.read(fd, 65536)))
        for fd, packets in waiting.items():
            while packets and packets[0][0] <= time.monotonic():
                os.write(fd, packets.popleft()[1])


if __name__ == "__main__":
    delay_ms, jitter_ms, *places = sys.argv[1:]
    devices = [make(f"lsdelay{i}", places[2 * i], places[2 * i + 1]) for i in (0, 1)]
    print("ready", flush=True)
    carry(devices, float(delay_ms) / 1e3, float(jitter_ms) / 1e3)
