"""A rank's tie to the agent that started it: when the agent is gone, for whatever reason, the rank ends."""

from __future__ import annotations

import os
import threading

from lockstep.errors import LostPeer


def watch() -> None:
    """End this process with LostPeer's status when its agent ends. Does nothing where there is no agent."""
    name = os.environ.pop("LOCKSTEP_LIFELINE_FD", None)
    if name is None:
        return
    descriptor = int(name)
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_wait, args=(descriptor,), name="lifeline", daemon=True).start()


def _wait(descriptor: int) -> None:
    os.read(descriptor, 1)  # Nothing is ever written: this returns when the other end closes.
    os._exit(LostPeer.exit_status)
