import mmap
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lockstep.model.cpu.pages import LARGE_PAGE, move_to_large_pages


def bytes_on_large_pages() -> int:
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return 1024 * int(found[1]) if found else 0


def gives_large_pages_when_asked() -> bool:
    """Not if it gives them to everybody anyway, nor if it has none."""
    if "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        return False
    with mmap.mmap(-1, 2 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        before = bytes_on_large_pages()
        memory.write(b"1" * 2 * LARGE_PAGE)
        return bytes_on_large_pages() > before


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for large pages")


@linux
def test_arrays_move_to_large_pages_and_keep_their_values():
    if not gives_large_pages_when_asked():
        pytest.skip("this system gives no large pages, or gives them anyway")
    numbers = mx.arange(4 * LARGE_PAGE // 4, dtype=mx.float32).reshape(512, -1)
    arrays = [numbers + 1, (numbers + 2).T]
    mx.eval(arrays)
    values, before = [np.array(array) for array in arrays], bytes_on_large_pages()
    for array in arrays:
        move_to_large_pages(array)
    assert bytes_on_large_pages() - before >= 2 * 3 * LARGE_PAGE
    assert all(np.array_equal(np.array(array), value) for array, value in zip(arrays, values, strict=True))


@linux
@pytest.mark.parametrize("array", [mx.ones((16,)), mx.ones((1024, 1024), mx.bfloat16)], ids=["small", "half"])
def test_other_arrays_stay_where_they_are(array):
    mx.eval(array)
    before = bytes_on_large_pages()
    move_to_large_pages(array)
    assert bytes_on_large_pages() == before
