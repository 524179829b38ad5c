"""Pushing while training (`hub_strategy`): with patience, aloud when it fails, and once more at the end of training.

Trainer's own background push gives up at the first trouble, and nobody hears of it.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from hf_qat.files.atomic import written_whole
from hf_qat.publish.hub import make_repository, push_directory
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
    def is_pushed(self) -> bool:
        """Whether it is known to be there."""
        return self.job is not None and self.job.done() and self.job.exception() is None


class BackgroundPush(Trainer):
    """A Trainer that keeps `hub_strategy`'s promise, or says that it could not.

    As Trainer's, a push that comes due while another is going on is left out, unless `hub_always_push`: then training
    waits, as the files must not change under it. Failures do not disturb the training: each is logged as an error with
    the command to go on, and at the end of `train()` what is not on the Hub is pushed again.
    """

    hub_model_id: Any
    push_in_progress: Any
    _saved: list[Saved]
    _pusher: ThreadPoolExecutor | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As Trainer's, with patience.

        Raises:
            PublishError: the Hub refuses, or it is to be private and exists for all to see.
        """
        if not self.is_world_process_zero():
            return
        self.hub_model_id = make_repository(
            self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name,
            token=self.args.hub_token if token is None else token,
            private=self.args.hub_private_repo if private is None else private,
        )
        self.push_in_progress = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; at the end, what could not be pushed in the background is pushed again.

        If that fails too, it is logged as an error: the results of training are on the disk and are returned.
        """
        self._saved = []
        output = super().train(*args, **kwargs)
        if self._saved:
            self._push_what_is_missing()
        return output

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push `output_dir` with the model of a checkpoint, and the checkpoint itself if `hub_strategy` says so."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        saved = Saved(Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}")
        self._saved.append(saved)
        going_on = [one.job for one in self._saved if one.job is not None and not one.job.done()]
        if going_on and not self.args.hub_always_push:
            return
        wait(going_on)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._copy_model(saved)
        except OSError as error:  # a full disk, for one; the end of training tries once more
            logger.error(f"A checkpoint is not on the Hub: {error}")
            return
        if self._pusher is None:
            self._pusher = ThreadPoolExecutor(1, thread_name_prefix="push")
        saved.job = self._pusher.submit(self._push_aloud, saved)
        self.push_in_progress = PushInProgress([saved.job])  # type: ignore[arg-type]  # its hint is wrong

    def _copy_model(self, saved: Saved) -> None:
        """Put the model of a checkpoint into `output_dir`, where it stays when the checkpoint goes."""
        with written_whole(str(self.args.output_dir)) as new:
            for file in saved.folder.iterdir():
                if file.is_file() and not any(fnmatch(file.name, pattern) for pattern in STATE_OF_TRAINING):
                    shutil.copy2(file, new)

    def _push_aloud(self, saved: Saved) -> None:
        try:
            self._push_model(saved)
            self._push_checkpoint(saved)
        except Exception as error:
            logger.error(f"A checkpoint is not on the Hub: {error}")
            raise

    def _push_model(self, saved: Saved) -> None:
        """Push what `_copy_model` has made."""
        self._push(Path(str(self.args.output_dir)), saved.message, ignore=(EXPORT_DIRECTORY,))

    def _push_checkpoint(self, saved: Saved) -> None:
        """Push the checkpoint to resume from, where `hub_strategy` asks for it."""
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: saved.folder.name}
        place = places.get(HubStrategy(self.args.hub_strategy))
        if place is not None:
            self._push(saved.folder, f"{saved.message}, checkpoint", path_in_repo=place)

    def _push(self, directory: Path, message: str, **options: Any) -> None:
        push_directory(
            directory,
            str(self.hub_model_id),
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=message,
            **options,
        )

    def _push_what_is_missing(self) -> None:
        """Push the newest checkpoint if it is not on the Hub, and all others if all are wanted there."""
        newest, everything = self._saved[-1], self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        missing = [saved for saved in self._saved if (everything or saved is newest) and not saved.is_pushed]
        try:
            for saved in missing:
                if not saved.folder.is_dir():
                    logger.error(f"{saved.folder} is not on the Hub, and was deleted meanwhile.")
                    continue
                if saved is newest:
                    self._copy_model(saved)
                    self._push_model(saved)
                self._push_checkpoint(saved)
        except Exception as error:
            logger.error(f"The training is done and saved, but what it gave is not all on the Hub: {error}")
