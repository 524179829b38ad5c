"""One process at a time writes to a directory: what two of them save would take each other's names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qat.errors import InUseError
from hf_qat.files.locks import Holder, locked


#: Directories in which this process is the only writer, by their real paths.
_OURS: set[str] = set()


@contextmanager
def only_writer(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, nobody else is in here with the same directory, where the system can tell; it leaves no file.

    Args:
        directory: is made if it is not there.

    Raises:
        InUseError: another process is, or another training of this one.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    with locked(directory) as holder:
        if holder is Holder.OTHERS:
            raise InUseError(
                f"another process is saving to {os.fspath(directory)}: what it saves would be overwritten. Wait for "
                "it, end it, or choose another output_dir."
            )
        path = os.path.realpath(directory)
        _OURS.add(path)
        try:
            yield
        finally:
            _OURS.discard(path)


@contextmanager
def only_process(directory: str | os.PathLike[str]) -> Iterator[None]:
    """`only_writer`, but this process may be one already: a training saves models to its own directory.

    Raises:
        InUseError: another process is writing there.
    """
    if os.path.realpath(directory) in _OURS:
        yield
        return
    with only_writer(directory):
        yield
