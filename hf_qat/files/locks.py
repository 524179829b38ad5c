"""Who is writing to a directory: the system's own locks (`flock`), which go with their process, even a killed one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: What a system says whose locks are held by another process; others, such as some network file systems, have none.
HELD = (errno.EWOULDBLOCK, errno.EACCES)


class Holder(Enum):
    """Who has the lock of a directory."""

    US = "this process"
    OTHERS = "another process, or another lock of this one"
    UNKNOWN = "the system cannot tell"


@contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[Holder]:
    """Lock a directory if nobody has it; yields who has it inside. It leaves no file.

    Raises:
        OSError: the directory is not there, or cannot be read.
    """
    if fcntl is None:
        yield Holder.UNKNOWN
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a worker that was forked meanwhile has it, too
        os.close(descriptor)


def _lock(descriptor: int) -> Holder:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return Holder.OTHERS if error.errno in HELD else Holder.UNKNOWN
    return Holder.US
