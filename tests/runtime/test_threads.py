from __future__ import annotations

import os
import sys
import threading

import pytest

from lockstep.runtime.threads import NICENESS, giving_way


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
def test_only_threads_of_the_block_let_others_go_first() -> None:
    def niceness(thread: threading.Thread) -> int:
        return os.getpriority(os.PRIO_PROCESS, thread.native_id or 0)

    end = threading.Event()
    before, within, after = (threading.Thread(target=end.wait, args=(10,)) for _ in range(3))
    before.start()
    try:
        own = niceness(before)
        with giving_way():
            within.start()
        after.start()
        assert [niceness(thread) - own for thread in (before, within, after)] == [0, NICENESS, 0]
        assert os.getpriority(os.PRIO_PROCESS, 0) == own
    finally:
        end.set()
        for thread in (before, within, after):
            thread.join(10)
