"""Files and directories that are there as a whole or not at all: written beside, forced to the disk, swapped in.

A file takes its place by one rename. A directory needs two, as no system exchanges directories with content: the
old one is renamed out of the way, then the new one is renamed into place. Whatever interrupts the two, Ctrl-C or an
error of the system, the old one is put back. After a process was killed there, the next one that writes to the same
place does so, and deletes what the killed one was writing. Nothing that is complete is deleted before its successor is
in place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_qat.errors import ExportError
from hf_qat.files.aside import REPLACED, beside, put_one_back, settle
from hf_qat.files.only_writer import only_thread


#: Name of the file that says what a directory of ours holds, so that all of it may be replaced.
MANIFEST = "SHA256SUMS"

#: Where models and checkpoints lie until they are complete. The underscore keeps it out of what
#: `Trainer.push_to_hub` uploads.
INCOMPLETE = "_incomplete"

#: In `INCOMPLETE`, the files of a model: those being written; all of them, when they are complete and those of the
#: model before are out of the way; and the latter, at the same paths.
WRITTEN, COMPLETE, SET_ASIDE = "_written", "_complete", "_set_aside"

#: Names of the files of weights that transformers writes; in their order, the index of several comes after them.
WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` at the end, or goes if anything is raised.

    Args:
        path: its directory is made if need be; a file that is there stays until the new one is complete.

    Raises:
        ExportError: it is a directory, or cannot be written to.
    """
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a directory. Name a file in it.")
    settle(path)
    with beside(path) as aside:
        made = aside / path.name
        yield made
        sync(aside)
        os.replace(made, path)
        sync_directory(path.parent)


@contextmanager
def whole_directory(directory: Path, compiled: str) -> Iterator[Path]:
    """An empty directory to write into, which becomes `directory` at the end, or goes if anything is raised.

    Args:
        directory: absent, empty, or one that was made here before, which is replaced.
        compiled: a name in it that is never replaced.

    Raises:
        ExportError: it holds something else, or cannot be written to.
    """
    settle(directory)
    require_replaceable(directory, compiled)
    with beside(directory) as aside:
        made = aside / directory.name
        made.mkdir()
        yield made
        put_in_place(made, directory)


@contextmanager
def written_whole(directory: str | Path) -> Iterator[Path]:
    """An empty directory to write a model into; at the end its files are moved to `directory`, whose others stay.

    Weights of a model that was there before go, also those in other files. While files are moved, `directory` has no
    weights, which `from_pretrained` always refuses; without a config.json, a model class would take its defaults. What
    is raised while the model is written leaves all as it was; while files are moved, either all as it was, or all new.

    Args:
        directory: is made if it is not there.

    Raises:
        InUseError: another process or thread is writing to it.
    """
    target = Path(directory)
    aside = target / INCOMPLETE
    with only_thread(target):
        discard(aside)
        written = aside / WRITTEN
        written.mkdir(parents=True)
        try:
            yield written
            sync(written)
            _set_aside(target, _files_in(written))
            os.rename(written, aside / COMPLETE)
            _move_in(target)
            sync_directory(target)
        finally:
            discard(aside)


def put_in_place(source: str | Path, target: str | Path) -> None:
    """Rename a complete directory, on the same file system; one that has the new name already is set aside.

    Args:
        source: its parent is a directory of ours, where the other one then lies, to be discarded.
        target: the new path.
    """
    source, target = Path(source), Path(target)
    sync(source)
    old = source.with_name(f"{REPLACED}{target.name}")
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(source, target)
    except BaseException:
        put_one_back(old, target)
        raise
    sync_directory(target.parent)


def put_back(run: str | Path) -> None:
    """Settle what a killed process was replacing: the old checkpoint or model is back, or the new one complete.

    Args:
        run: directory of the checkpoints, or of a model.
    """
    run = Path(run)
    for old in (run / INCOMPLETE).glob(f"{REPLACED}*"):
        put_one_back(old, run / old.name.removeprefix(REPLACED))
    if (run / INCOMPLETE / COMPLETE).exists():
        _move_in(run)
        return
    set_aside = run / INCOMPLETE / SET_ASIDE
    for file in _files_in(set_aside):
        os.replace(set_aside / file, run / file)


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
    if (doomed / SET_ASIDE).exists():
        shutil.rmtree(doomed / SET_ASIDE)  # before `COMPLETE`, without which it would be put back
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


def require_replaceable(directory: Path, compiled: str) -> None:
    """Raise `ExportError` for what `whole_directory` would not replace; of the same arguments."""
    if directory.is_file():
        raise ExportError(f"cannot write {directory}: it is a file. Name a directory.")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / MANIFEST).is_file():
        raise ExportError(f"{directory} is not empty and no bundle: name a new directory, so that nothing is lost.")
    if (directory / compiled).exists():
        raise ExportError(f"{directory / compiled} holds a compiled model: move it away, or name a new directory.")


def _set_aside(target: Path, files: list[Path]) -> None:
    """Move what `files` are about to replace out of the way; in an order that never leaves an index without weights.

    From here on, a move into `target` cannot fail for what is in its way.
    """
    aside = target / INCOMPLETE / SET_ASIDE
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if (target / file).is_dir():
            raise IsADirectoryError(f"{target / file} is a directory, and a file of that name is to be saved.")
    replaced = {file for file in files if (target / file).exists()}
    replaced |= {Path(file.name) for file in target.iterdir() if _is_weights(file)}
    for file in sorted(replaced, key=_weights_last, reverse=True):
        (aside / file).parent.mkdir(parents=True, exist_ok=True)
        os.rename(target / file, aside / file)


def _move_in(target: Path) -> None:
    """Move a complete model into its directory, or what is left of it to be moved; weights last."""
    complete = target / INCOMPLETE / COMPLETE
    for file in sorted(_files_in(complete), key=_weights_last):
        os.replace(complete / file, target / file)


def _files_in(directory: Path) -> list[Path]:
    """Paths of all files below it, relative to it."""
    return [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]


def _weights_last(file: Path) -> tuple[bool, Path]:
    return _is_weights(file), file


def _is_weights(file: Path) -> bool:
    return WEIGHTS.fullmatch(file.name) is not None
