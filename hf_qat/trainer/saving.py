"""What is saved is there as a whole or not at all: it is written aside, forced to the disk, and then moved into place.

Trainer writes the files of a checkpoint one after the other under its final name, and resumes from the highest number
there is. Here a process that is killed leaves at most a directory `_incomplete` behind. Nobody takes that for a
checkpoint, the Trainer's uploads leave it out, and the next time something is saved it goes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, sort_checkpoints

from hf_qat.files.atomic import INCOMPLETE, discard, put_in_place, written_whole
from hf_qat.trainer import checks
from hf_qat.trainer.pushing import BackgroundPush, Destination


class CheckpointFolder:
    """Where the checkpoints of a trainer are: Trainer asks for it each time that it writes or looks for one."""

    def __init__(self) -> None:
        self._aside: str | None = None

    def path(self, run: str) -> str:
        """The directory of the checkpoints of a run; while one is being written, the directory `_incomplete` in it."""
        return run if self._aside is None else self._aside

    @contextmanager
    def completed(self, trainer: Trainer, run: str) -> Iterator[str]:
        """Inside, Trainer writes the checkpoint of this step aside; in the end it gets its name, which this yields.

        Every process of a distributed training comes here, and most write a file of their own.

        Args:
            trainer: whose state says which step it is.
            run: directory of the checkpoints.
        """
        state, together = trainer.state, trainer.accelerator.wait_for_everyone
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        aside, best = os.path.join(run, INCOMPLETE), state.best_model_checkpoint
        if trainer.args.should_save:
            discard(aside)
        together()
        self._aside = aside
        try:
            yield os.path.join(run, name)
        finally:
            self._aside = None
            state.best_model_checkpoint = best  # Trainer looks for it aside, where only the new one is
        _note_best(state, run)
        together()
        if trainer.args.should_save:
            state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            put_in_place(os.path.join(aside, name), os.path.join(run, name))
            discard(aside)
        together()


class CheckpointingTrainer(Trainer):
    """The hooks of Trainer around a checkpoint: whole or not at all, pushed with patience, loaded only if it fits."""

    model: nn.Module
    hub_model_id: Any
    push_in_progress: Any

    def __init__(self, *trainer_positional: Any, **trainer_arguments: Any) -> None:
        self._checkpoints, self._pushes = CheckpointFolder(), BackgroundPush()
        super().__init__(*trainer_positional, **trainer_arguments)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load what training goes on from; `WeightsError` for a checkpoint of a float training."""
        checks.check_resumable(self.model, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise `WeightsError` for a checkpoint that leaves a part of the model unfilled, where Trainer warns."""
        checks.check_loaded(self.model, load_result.missing_keys, load_result.unexpected_keys)

    def _get_output_dir(self, trial: Any) -> str:
        """Where the checkpoints of a run are; the directory aside while one is being written."""
        return self._checkpoints.path(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, and give it its name when it is complete; then push it, and delete older ones."""
        run = self._get_output_dir(trial)
        with self._checkpoints.completed(self, run) as checkpoint:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if is_about_to_go(self):
            self._finish_current_push()
        if self.args.should_save:
            delete_older(self.state, run, self.args.save_total_limit, self._pushes.in_use())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write model, processor and arguments; all of them are there or none."""
        directory = str(self.args.output_dir if output_dir is None else output_dir)
        with model_written_whole(directory) if self.args.should_save else nullcontext(directory) as place:
            super()._save(place, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push `output_dir` with the model of a checkpoint, and the checkpoint itself if `hub_strategy` says so.

        Trainer asks for that while the checkpoint is written aside, and `_save_checkpoint` again when it has its name.
        """
        if is_unfinished(checkpoint_folder) or not self.is_world_process_zero():
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        saved = self._pushes.add(checkpoint_folder, self.state.global_step)
        if self._pushes.is_idle(wait_for_it=self.args.hub_always_push):
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._pushes.start(saved, self._destination())
            self.push_in_progress = self._pushes.in_progress()

    def _destination(self) -> Destination:
        """Where the checkpoints of a training are pushed to."""
        return Destination.of(self.args, self.hub_model_id)


def is_unfinished(directory: str | Path) -> bool:
    """Whether a checkpoint is still being written: it lies aside, and not under its final name."""
    return Path(directory).parent.name == INCOMPLETE


@contextmanager
def model_written_whole(directory: str) -> Iterator[str]:
    """Yields where to write the files of a model that is to be in `directory`: aside, unless all of that is aside."""
    if is_unfinished(directory):
        yield directory
        return
    with written_whole(directory) as aside:
        yield str(aside)


def delete_older(state: TrainerState, run: str, limit: int | None, in_use: Collection[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit`, as `rotate_checkpoints` of transformers does, but each at once.

    Args:
        state: knows the best checkpoint, which stays, as the latest does.
        run: directory of the checkpoints.
        limit: `save_total_limit`; `None` or 0 keeps all.
        in_use: checkpoints that are being read; they stay until the next time.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = sort_checkpoints(run, use_mtime=True)
    kept = {checkpoints[-1], str(Path(state.best_model_checkpoint or checkpoints[-1]))}
    others = [path for path in checkpoints if path not in kept]
    for path in others[: max(0, len(checkpoints) - max(limit, len(kept)))]:
        if Path(path) not in in_use:
            discard(path)


def is_about_to_go(trainer: Trainer) -> bool:
    """Whether Trainer will delete the checkpoint that was just saved: the last one, of one that may stay, if not best.

    It does so when training ends, before it waits for pushes.
    """
    only_best = trainer.args.save_total_limit == 1 and trainer.state.best_model_checkpoint is not None
    return only_best and trainer.control.should_training_stop


def _note_best(state: TrainerState, run: str) -> None:
    """Name the best checkpoint, by the place where it is or is about to be."""
    if state.best_global_step:
        path = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if state.best_global_step == state.global_step or os.path.exists(path):
            state.best_model_checkpoint = path
