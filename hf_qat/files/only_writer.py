"""One process at a time writes to a directory: the checkpoints of two trainings would take each other's names."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qat.errors import InUseError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: What a system says whose locks are held by another process; others, such as some network file systems, have none.
HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def only_writer(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process is in here with the same directory, where the system can tell; it leaves no file.

    The lock is the system's own (`flock` of the directory), and goes with the process, also if that is killed.

    Args:
        directory: is made if it is not there.

    Raises:
        InUseError: another process is.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _lock(descriptor, directory)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a worker that was forked meanwhile has it, too
        os.close(descriptor)


def _lock(descriptor: int, directory: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise InUseError(
                f"another process is training in {os.fspath(directory)}: its checkpoints would be overwritten. Wait "
                "for it, end it, or choose another output_dir."
            ) from error
