"""A directory that is there as a whole or not at all, with a manifest of its files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qat.errors import ExportError


#: One line a file, as `sha256sum` writes and checks it.
MANIFEST = "SHA256SUMS"


@contextmanager
def whole_directory(directory: Path, compiled: str) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its place at the end, or goes if anything is raised.

    Args:
        directory: absent, empty, or one that was made here before, which is replaced.
        compiled: a name in it that is never replaced.

    Raises:
        ExportError: it holds something else, or cannot be written to.
    """
    _check_replaceable(directory, compiled)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    except OSError as error:
        raise ExportError(f"cannot write {directory}: {error.strerror}. Choose one that you may write to.") from error
    try:
        made = temporary / "new"
        made.mkdir()
        yield made
        if directory.exists():
            directory.replace(temporary / "old")
        made.replace(directory)
    finally:
        shutil.rmtree(temporary)


def _check_replaceable(directory: Path, compiled: str) -> None:
    if directory.is_file():
        raise ExportError(f"cannot write {directory}: it is a file. Name a directory.")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / MANIFEST).is_file():
        raise ExportError(f"{directory} is not empty and no bundle: name a new directory, so that nothing is lost.")
    if (directory / compiled).exists():
        raise ExportError(f"{directory / compiled} holds a compiled model: move it away, or name a new directory.")


def digest(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_manifest(directory: Path) -> None:
    """Write `SHA256SUMS` of all files below a directory."""
    files = sorted(Path(root) / name for root, _, names in os.walk(directory) for name in names if name != MANIFEST)
    lines = [f"{digest(file)}  {file.relative_to(directory).as_posix()}\n" for file in files]
    (directory / MANIFEST).write_text("".join(lines), encoding="utf-8")
