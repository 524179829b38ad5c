"""Loops on the threads that PyTorch computes with.

Threads of one's own would compete with PyTorch's, which go on asking for work for a while after each operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch


Start = Callable[[int, int, int, int], None]


def run(loop: Any, call: ctypes.Structure, chunks: int) -> None:
    """Call `loop`, compiled by `numba.cfunc`, with `call` on each of the threads, or on this one where that is enough.

    Args:
        loop: takes a pointer to `call`; returns when nothing is left to do.
        chunks: that there are to do.
    """
    threads = torch.get_num_threads()
    start = _start_team() if threads > 1 and chunks > 1 else None
    if start is None:
        loop.ctypes(ctypes.addressof(call))
    else:
        start(loop.address, ctypes.addressof(call), threads, 0)


@cache
def _start_team() -> Start | None:
    """`GOMP_parallel` of the OpenMP library that PyTorch computes with, on Linux; `None`, one thread, elsewhere."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        start = ctypes.CDLL(str(library)).GOMP_parallel  # found among the libraries that it was linked with
    except (OSError, AttributeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start
