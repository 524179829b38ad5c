"""Hidden directories beside a file or directory, in which the next version of it lies until it is complete.

They go when it is, or when writing it fails. A process that is killed leaves its own behind; the next one that writes
to the same place deletes it. Which are those of living processes, their locks tell.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qat.errors import ExportError
from hf_qat.files.locks import Holder, locked


#: How the name of a directory begins whose place a new one is about to take.
REPLACED = "replaced-"

#: How the names of the directories in here end: `.model.onnx-k3v9x2ab.incomplete`.
SUFFIX = ".incomplete"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A directory beside `path`, on its file system, which goes at the end; what it holds of `path` is put back.

    Args:
        path: its directory is made if need be.

    Raises:
        ExportError: nothing can be written there.
    """
    while True:
        aside = _made(path)
        with contextlib.ExitStack() as stack:
            if not _is_ours(aside, stack):
                continue
            try:
                yield aside
            finally:
                put_one_back(aside / f"{REPLACED}{path.name}", path)
                shutil.rmtree(aside)
            return


def settle(path: Path) -> None:
    """Put back what killed processes were replacing at `path`, and delete what they were writing.

    What living processes write stays, and so does all of it where the system cannot tell.
    """
    name = re.compile(rf"\.{re.escape(path.name)}-[a-z0-9_]{{8}}{re.escape(SUFFIX)}")  # as `mkdtemp` draws it
    with contextlib.suppress(OSError):  # the directory is not there yet, or cannot be listed
        for left in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):  # it is gone meanwhile, or another user's
                _settle_one(left, path)


def put_one_back(old: Path, target: Path) -> None:
    """Undo the first of two renames, unless the second one came through."""
    if old.exists() and not target.exists():
        os.rename(old, target)


def _made(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=SUFFIX))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}. Choose a path that you may write to.") from error


def _is_ours(aside: Path, stack: contextlib.ExitStack) -> bool:
    """Lock it until the stack ends; not ours if another process has come before, and takes it for a killed one's."""
    with contextlib.suppress(FileNotFoundError):
        return stack.enter_context(locked(aside)) is not Holder.OTHERS and aside.exists()
    return False


def _settle_one(left: Path, path: Path) -> None:
    with locked(left) as holder:
        if holder is Holder.OTHERS:
            return
        put_one_back(left / f"{REPLACED}{path.name}", path)
        if holder is Holder.US:
            shutil.rmtree(left)
