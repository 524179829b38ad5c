"""One process at a time writes to a directory: the checkpoints of two trainings would take each other's names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qat.errors import InUseError
from hf_qat.files.locks import Holder, locked


@contextmanager
def only_writer(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process is in here with the same directory, where the system can tell; it leaves no file.

    Args:
        directory: is made if it is not there.

    Raises:
        InUseError: another process is.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    with locked(directory) as holder:
        if holder is Holder.OTHERS:
            raise InUseError(
                f"another process is training in {os.fspath(directory)}: its checkpoints would be overwritten. Wait "
                "for it, end it, or choose another output_dir."
            )
        yield
