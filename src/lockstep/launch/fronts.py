"""The front process, and a spare one: it has loaded everything, does nothing, and takes over at once.

To load takes seconds of a core, and more while the ranks compute on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from lockstep.launch.job import Job
from lockstep.launch.launcher import Running
from lockstep.server.notice import SPARE, Notice

PROGRAM = ("-m", "lockstep.server.front")
SPARE_AFTER_S = 15.0
"""From the start of one front process to that of its spare, so as not to slow down the start of the ranks."""
SPARE_AGAIN_S = 60.0
"""From a try to start a spare process, in vain, to the next one."""


class Fronts:
    """At most one front process serves; the constructor starts it."""

    def __init__(self, job: Job, start: Callable[[Job], Running], keep_spare: bool) -> None:
        """`start` starts a job whose end the owner hears of."""
        self._job, self._start, self._keep_spare = replace(job, argv=PROGRAM, fed=True), start, keep_spare
        self._spare: Running | None = None
        self.serving: Running
        self.spare_due_s: float | None
        """When `add_spare` is to be called, by the monotonic clock; None if it is not."""
        self.replace()

    def replace(self) -> None:
        """Let the spare process serve, or a new one if there is none yet.

        Raises LockstepError when that cannot be started; `serving` is the one before it then.
        """
        if self._spare is None:
            self.serving = self._start(self._job)
        else:
            self.serving, self._spare = self._spare, None
            self.tell(Notice(begin=True))
        self.spare_due_s = time.monotonic() + SPARE_AFTER_S if self._keep_spare else None

    def add_spare(self) -> None:
        """Start the process that is to take over. Raises LockstepError when it cannot be; try again then."""
        self.spare_due_s = time.monotonic() + SPARE_AGAIN_S
        self._spare = self._start(replace(self._job, argv=(*PROGRAM, SPARE)))
        self.spare_due_s = None

    def lost(self, running: Running) -> bool:
        """Whether it was the spare process that has ended; the next one comes with the next front process."""
        if running is not self._spare:
            return False
        self._spare.end()
        self._spare = None
        return True

    def tell(self, notice: Notice) -> None:
        """Tell the process that serves."""
        self.serving.feed(notice.encode())

    def end(self) -> None:
        """End both, and wait for it."""
        for running in filter(None, (self._spare, self.serving)):
            running.end()
