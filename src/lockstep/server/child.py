"""Under bare `mlx.launch` or `mpirun` nobody has started a front process: rank 0 does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from lockstep.engine.wire import ENVIRONMENT as LINK
from lockstep.engine.wire import LinkConfig
from lockstep.server.settings import ENVIRONMENT as SETTINGS
from lockstep.server.settings import ServerSettings


def start(settings: ServerSettings) -> tuple[LinkConfig, subprocess.Popen[bytes]]:
    """Start the front process as a child, which ends with this process; the way to it, and itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = LinkConfig.make(listener.getsockname()[1])
    env = {**os.environ, LINK: link.encode(), SETTINGS: settings.encode()}
    command = [sys.executable, "-m", "lockstep.server.front"]
    return link, subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL)
