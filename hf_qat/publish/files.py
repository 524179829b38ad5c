"""Which files of a directory go to the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from hf_qat.errors import PublishError
from hf_qat.tidl.artifacts import WORKING_FILES


#: In the top directory only. Trainer leaves these out too: what is not for others, and checkpoints to resume from.
IGNORED_AT_TOP = ("_*", "checkpoint-*")

#: Directories, anywhere: caches, and what TI's compiler needed while it ran.
IGNORED_DIRECTORIES = ("__pycache__", WORKING_FILES)

#: Files, anywhere: half-written ones, and `training_args.bin`, which is a pickle that holds `hub_token` in plain text
#: and is not needed to load or to resume.
IGNORED_FILES = ("training_args.bin", "*.tmp", "*.temp", "*.part", "*.incomplete", "*.lock", "*.pyc", "*~")

#: Other names that begin with a dot are of editors, of git, or temporary.
HIDDEN_BUT_WANTED = ".gitattributes"


def published_files(directory: Path, ignore: Sequence[str] = ()) -> dict[str, Path]:
    """The files to publish, sorted, by their path below the directory, with `/`.

    Args:
        directory: to look through, with those below.
        ignore: patterns of names in the top directory to leave out too.

    Raises:
        PublishError: no directory, or nothing in it to publish.
    """
    if not directory.is_dir():
        raise PublishError(f"{directory} is no directory: name the one that was saved or exported to.")
    found = {}
    for root, directories, names in os.walk(directory):
        here = (*IGNORED_AT_TOP, *ignore) if Path(root) == directory else ()
        directories[:] = [name for name in directories if not _is_ignored(name, (*IGNORED_DIRECTORIES, *here))]
        for name in names:
            if not _is_ignored(name, (*IGNORED_FILES, *here)):
                file = Path(root, name)
                found[file.relative_to(directory).as_posix()] = file
    if not found:
        raise PublishError(f"{directory} has nothing to publish: save or export a model to it first.")
    return dict(sorted(found.items()))


def _is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    if name.startswith("."):
        return name != HIDDEN_BUT_WANTED
    return any(fnmatch(name, pattern) for pattern in patterns)
