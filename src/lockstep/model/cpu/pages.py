"""Large pages for weights. A decode reads all of them, and looks up where each page of 4 KB is, which takes
5% of its time on one rank, and up to a sixth where two ranks share the memory.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import mlx.core as mx
import numpy as np

LARGE_PAGE = 2 << 20
"""Bytes, on x86-64 and, with base pages of 4 KB, on ARM."""

_MADV_COLLAPSE = 25
"""To Linux since 6.1: make large pages of these, now and whatever the system's setting is."""


def move_to_large_pages(array: mx.array) -> None:
    """Let this evaluated float32 array lie on large pages, its ends too where its neighbours' memory is ours.

    Nothing happens to arrays of less than a quarter of such a page, or where there are none to be had.
    """
    if sys.platform != "linux" or array.dtype != mx.float32 or array.nbytes < LARGE_PAGE // 4:
        return
    first, last = np.lib.array_utils.byte_bounds(np.array(array, copy=False))
    for start in range(first - first % LARGE_PAGE, last, LARGE_PAGE):
        refused = _madvise()(start, LARGE_PAGE, _MADV_COLLAPSE) != 0
        # Beside an array may be a hole. Inside, an older kernel refuses, or there is no memory in one piece.
        if refused and first <= start and start + LARGE_PAGE <= last:
            return


@cache
def _madvise() -> ctypes._NamedFuncPointer:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
