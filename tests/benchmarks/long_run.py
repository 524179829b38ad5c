"""Memory and open files of a long training: 2000 steps, evaluated, saved, ended and resumed every 200.

    python tests/benchmarks/long_run.py [--steps 2000] [--every 200]

Prints resident memory and open files at each stop, and the slope of memory over the second half, in kB a step. Each
stop makes a new trainer, which exports the model anew, and PyTorch's cache for fake tensors keeps some 0.7 MB of that;
what steps keep is what the slope has beyond it: compare `--every 200` with `--steps 50 --every 5`.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.models import resnet
from tests.training import images, trainer_of


class StopEvery(TrainerCallback):
    """Ends a training after so many steps, as if its time was up; the number of steps of the whole stays."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the checkpoint of this step is asked for."""
        control.should_training_stop |= state.global_step % self.steps == 0


def resident() -> int:
    """kB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def open_files() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def run(steps: int, every: int, directory: Path) -> list[tuple[int, int, int]]:
    """(step, kB, open files) at each stop."""
    train, evaluation, found = images(64), images(16, seed=1), []
    while not found or found[-1][0] < steps:
        trainer = trainer_of(
            resnet(),
            directory,
            train_dataset=train,
            eval_dataset=evaluation,
            max_steps=steps,
            logging_steps=every,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            callbacks=[StopEvery(every)],
        )
        trainer.train(resume_from_checkpoint=get_last_checkpoint(directory) if found else None)
        step = trainer.state.global_step
        del trainer
        gc.collect()
        found.append((step, resident(), open_files()))
        print(f"step {found[-1][0]:5}  {found[-1][1] / 1024:8.1f} MB  {found[-1][2]:4} open files", flush=True)
    return found


def main() -> None:
    """Run, and fit a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        found = run(options.steps, options.every, Path(directory) / "run")
    half = np.array(found[len(found) // 2 :], dtype=np.float64)
    print(f"slope over the second half: {np.polyfit(half[:, 0], half[:, 1], 1)[0]:.2f} kB a step")


if __name__ == "__main__":
    main()
