"""One thread of one process at a time writes to a directory: what two save would take each other's names."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qat.errors import InUseError
from hf_qat.files.locks import Holder, locked


#: Directories in which this process is the only writer, by their real paths, each with the thread that is.
_OURS: set[tuple[str, int]] = set()


@contextmanager
def only_writer(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, nobody else is in here with the same directory, where the system can tell; it leaves no file.

    Args:
        directory: is made if it is not there.

    Raises:
        InUseError: another process is, or another thread or training of this one.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    with locked(directory) as holder:
        if holder is Holder.OTHERS:
            raise InUseError(
                f"another process or thread is saving to {os.fspath(directory)}: what it saves would be overwritten. "
                "Wait for it, end it, or choose another output_dir."
            )
        ours = _here(directory)
        _OURS.add(ours)
        try:
            yield
        finally:
            _OURS.discard(ours)


@contextmanager
def only_thread(directory: str | os.PathLike[str]) -> Iterator[None]:
    """`only_writer`, but this thread may be one already: a training saves models to its own directory.

    Raises:
        InUseError: another process or thread is writing there.
    """
    if _here(directory) in _OURS:
        yield
        return
    with only_writer(directory):
        yield


def _here(directory: str | os.PathLike[str]) -> tuple[str, int]:
    return os.path.realpath(directory), threading.get_ident()
