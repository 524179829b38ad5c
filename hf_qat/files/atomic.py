"""A directory that is there as a whole or not at all, with a manifest of its files."""

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
from hf_qat.files.manifest import MANIFEST


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


#: Where things lie until they are complete. The underscore keeps it out of what `Trainer.push_to_hub` uploads.
INCOMPLETE = "_incomplete"


#: Names of the files of weights that transformers writes; in their order, the index of several comes after them.
WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?")


#: How the name of a checkpoint begins, in `INCOMPLETE`, whose place a new one is about to take.
REPLACED = "replaced-"


@contextmanager
def written_whole(directory: str | Path) -> Iterator[Path]:
    """A new directory to write a model into; at the end its files are moved to `directory`, whose others stay.

    Weights of a model that was there before go, also those in other files. While files are moved, `directory` has no
    weights, which `from_pretrained` always refuses; without a config.json, a model class would take its defaults. An
    error inside leaves all as it was.

    Args:
        directory: is made if it is not there.
    """
    target = Path(directory)
    aside = target / INCOMPLETE
    discard(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync(aside)
        files = [file.relative_to(aside) for file in sorted(aside.rglob("*")) if file.is_file()]
        if any(_is_weights(file) for file in files):
            for old in sorted(filter(_is_weights, target.iterdir()), reverse=True):  # the index before what it names
                old.unlink()
        for file in sorted(files, key=lambda file: (_is_weights(file), file)):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / file, target / file)
        sync_directory(target)
    finally:
        discard(aside)


def _is_weights(file: Path) -> bool:
    return WEIGHTS.fullmatch(file.name) is not None


def put_in_place(source: str | Path, target: str | Path) -> None:
    """Rename a complete directory, on the same file system; one that has the new name already goes.

    Args:
        source: its parent is a directory of ours.
        target: the new path.
    """
    source, target = Path(source), Path(target)
    sync(source)
    if target.exists():
        os.rename(target, source.with_name(f"{REPLACED}{target.name}"))
    os.rename(source, target)
    sync_directory(target.parent)


def put_back(run: str | Path) -> None:
    """Undo the first half of a `put_in_place` that was killed between its two halves.

    Args:
        run: directory of the checkpoints.
    """
    for old in (Path(run) / INCOMPLETE).glob(f"{REPLACED}*"):
        target = Path(run) / old.name.removeprefix(REPLACED)
        if not target.exists():
            os.rename(old, target)


def discard(directory: str | Path) -> None:
    """Delete a directory, if it is there; under its own name it is there as a whole or not at all."""
    directory = Path(directory)
    if not directory.exists():
        return
    doomed = directory if directory.name == INCOMPLETE else directory.with_name(INCOMPLETE)
    put_back(doomed.parent)
    if doomed != directory:
        discard(doomed)
        os.rename(directory, doomed)
    shutil.rmtree(doomed)


def sync(directory: Path) -> None:
    """Wait until all files in it, at any depth, are on the disk: a rename may come to be there before its content."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb+" if os.access(path, os.W_OK) else "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """The names in it, where the system can: Windows and some network file systems cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
