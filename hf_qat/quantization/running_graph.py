"""Whether a captured graph is running: a layer is otherwise called by Python code, which calls its batch norm, too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Running(threading.local):
    """How many graphs are running in a thread, one inside the other."""

    depth = 0


_RUNNING = _Running()


@contextmanager
def running_graph() -> Iterator[None]:
    """Inside, layers are called by a graph."""
    _RUNNING.depth += 1
    try:
        yield
    finally:
        _RUNNING.depth -= 1


def is_running_graph() -> bool:
    """Whether a graph calls; a compiler, which cannot look at the thread, takes it so."""
    return torch.compiler.is_compiling() or _RUNNING.depth > 0
