"""What is saved is there as a whole or not at all: it is written aside, forced to the disk, and then moved into place.

A process that is killed leaves at most a directory `_incomplete` behind. Nobody takes that for a checkpoint, the
Trainer's uploads leave it out, and the next time something is saved it goes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints


#: Where things lie until they are complete. The underscore keeps it out of what `Trainer.push_to_hub` uploads.
INCOMPLETE = "_incomplete"

#: Names of the files of weights that transformers writes; in their order, the index of several comes after them.
WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?")

#: How the name of a checkpoint begins, in `INCOMPLETE`, whose place a new one is about to take.
REPLACED = "replaced-"


class AtomicSaving(Trainer):
    """A Trainer whose `checkpoint-N` appears under that name when it is complete, and whose models are saved whole.

    Trainer writes its files one after the other under the final name, and resumes from the highest number there is.
    """

    _aside: str | None = None
    """The directory in which a checkpoint is being made, `None` between checkpoints."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; a checkpoint that a killed training was about to replace is there again before."""
        if self.args.should_save:
            put_back(str(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else self._aside

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, in a directory aside; uploads and deletes older checkpoints once the new one is in place.

        Every process of a distributed training comes here, and most write a file of their own.
        """
        run, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, best = os.path.join(run, INCOMPLETE), self.state.best_model_checkpoint
        if self.args.should_save:
            discard(aside)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
            self.state.best_model_checkpoint = best
        self._note_best(run)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            put_in_place(os.path.join(aside, name), os.path.join(run, name))
            discard(aside)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run, name))
        if self.args.should_save:
            self._delete_older(run)

    def _note_best(self, run: str) -> None:
        """What Trainer looks for in the directory of the new checkpoint, where only that one is."""
        if self.state.best_global_step:
            path = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if self.state.best_global_step == self.state.global_step or os.path.exists(path):
                self.state.best_model_checkpoint = path

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint has its final name: uploads go on in the background."""
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _delete_older(self, run: str) -> None:
        """What `rotate_checkpoints` of transformers deletes, which leaves half of a checkpoint where it is killed."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        checkpoints = sort_checkpoints(run, use_mtime=True)
        kept = {checkpoints[-1], str(Path(self.state.best_model_checkpoint or checkpoints[-1]))}
        others = [path for path in checkpoints if path not in kept]
        for path in others[: max(0, len(checkpoints) - max(limit, len(kept)))]:
            discard(path)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As Trainer's: what `save_model` writes."""
        directory = str(self.args.output_dir if output_dir is None else output_dir)
        if self._aside is not None or not self.args.should_save:
            super()._save(directory, state_dict)
            return
        with written_whole(directory) as aside:
            super()._save(str(aside), state_dict)


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
