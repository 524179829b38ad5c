"""What is saved is there as a whole or not at all: it is written aside, forced to the disk, and then moved into place.

A process that is killed leaves at most a directory `_incomplete` behind. Nobody takes that for a checkpoint, the
Trainer's uploads leave it out, and the next time something is saved it goes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from hf_qat.files.atomic import INCOMPLETE, discard, put_back, put_in_place, written_whole


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
