"""Pushing while training (`hub_strategy`): with patience, aloud when it fails, and once more at the end of training.

Trainer's own background push gives up at the first trouble, and nobody hears of it.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import run_as_future
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from hf_qat.files.atomic import written_whole
from hf_qat.publish.hub import push_directory
from hf_qat.trainer.publishing import EXPORT_DIRECTORY


logger = logging.get_logger(__name__)

#: Files of a checkpoint that only resuming needs.
STATE_OF_TRAINING = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin")


@dataclass
class Saved:
    """A checkpoint that is to be on the Hub; `job` pushes it, or is `None` if another push was still going on."""

    folder: Path
    message: str
    job: Future[None] | None = None

    @property
    def is_being_pushed(self) -> bool:
        """Whether its push has begun, and not come to an end."""
        return self.job is not None and not self.job.done()

    @property
    def is_pushed(self) -> bool:
        """Whether it is known to be there."""
        return self.job is not None and self.job.done() and self.job.exception() is None


@dataclass(frozen=True)
class Destination:
    """Where the checkpoints of a training go, and what of them."""

    repo_id: str
    token: str | None
    revision: str | None
    strategy: HubStrategy
    directory: Path

    @classmethod
    def of(cls, args: TrainingArguments, repo_id: object) -> Destination:
        """What the arguments say; `repo_id` is the full name."""
        strategy, directory = HubStrategy(args.hub_strategy), Path(str(args.output_dir))
        return cls(str(repo_id), args.hub_token, args.hub_revision, strategy, directory)

    def place_of_checkpoint(self, folder: Path) -> str | None:
        """Its directory in the repository; `None` where only the model is pushed."""
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        return places.get(self.strategy)

    def push(self, directory: Path, message: str, **options: Any) -> None:
        """Push a directory, with the patience of `push_directory`."""
        push_directory(
            directory, self.repo_id, token=self.token, revision=self.revision, commit_message=message, **options
        )

    def push_model(self, saved: Saved) -> None:
        """Push what `copy_model` has made."""
        self.push(self.directory, saved.message, ignore=(EXPORT_DIRECTORY,))

    def push_checkpoint(self, saved: Saved) -> None:
        """Push the checkpoint to resume from, where `hub_strategy` asks for it."""
        place = self.place_of_checkpoint(saved.folder)
        if place is not None:
            self.push(saved.folder, f"{saved.message}, checkpoint", path_in_repo=place)

    def copy_model(self, saved: Saved) -> None:
        """Put the model of a checkpoint into the output directory, where it stays when the checkpoint goes."""
        with written_whole(self.directory) as new:
            for file in saved.folder.iterdir():
                if file.is_file() and not any(fnmatch(file.name, pattern) for pattern in STATE_OF_TRAINING):
                    shutil.copy2(file, new)


class BackgroundPush:
    """The pushes of one training, which keep `hub_strategy`'s promise, or say that they could not.

    As in Trainer, a push that comes due while another is going on is left out, unless it is to be waited for: the
    files must not change under it. Failures do not disturb the training: each is logged as an error with the command
    to go on, and `push_missing` tries again.
    """

    def __init__(self) -> None:
        self._saved: list[Saved] = []

    def add(self, folder: str, step: int) -> Saved:
        """Note that a checkpoint is to be on the Hub."""
        saved = Saved(Path(folder), f"Training in progress, step {step}")
        self._saved.append(saved)
        return saved

    def is_idle(self, wait_for_it: bool) -> bool:
        """Whether no push is going on; if so wanted, it is waited for."""
        running = [saved.job for saved in self._saved if saved.job is not None and saved.is_being_pushed]
        if wait_for_it:
            wait(running)
        return wait_for_it or not running

    def in_use(self) -> set[Path]:
        """The checkpoints that are being pushed: they must not be deleted."""
        return {saved.folder for saved in self._saved if saved.is_being_pushed}

    def in_progress(self) -> PushInProgress:
        """What Trainer waits for at the end of training."""
        return PushInProgress([saved.job for saved in self._saved if saved.job is not None])  # type: ignore[arg-type]

    def start(self, saved: Saved, destination: Destination) -> None:
        """Push a checkpoint in the background; no other push may be going on."""
        try:
            destination.copy_model(saved)
        except OSError as error:  # a full disk, for one; the end of training tries once more
            logger.error(f"A checkpoint is not on the Hub: {error}")
        else:
            saved.job = run_as_future(_push_aloud, saved, destination)

    def push_missing(self, destination: Destination) -> None:
        """Push the newest checkpoint if it is not on the Hub, and all others if all are wanted there.

        If that fails too, it is logged as an error: what training gave is on the disk.
        """
        everything = destination.strategy == HubStrategy.ALL_CHECKPOINTS
        wanted = self._saved if everything else self._saved[-1:]
        try:
            for saved in wanted:
                if not saved.is_pushed:
                    _push_again(saved, destination, newest=saved is self._saved[-1])
        except Exception as error:
            logger.error(f"The training is done and saved, but what it gave is not all on the Hub: {error}")


def _push_aloud(saved: Saved, destination: Destination) -> None:
    try:
        destination.push_model(saved)
        destination.push_checkpoint(saved)
    except Exception as error:
        logger.error(f"A checkpoint is not on the Hub: {error}")
        raise


def _push_again(saved: Saved, destination: Destination, newest: bool) -> None:
    if not saved.folder.is_dir():
        logger.error(f"{saved.folder} is not on the Hub, and was deleted meanwhile.")
        return
    if newest:
        destination.copy_model(saved)
        destination.push_model(saved)
    destination.push_checkpoint(saved)
