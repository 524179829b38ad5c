"""What the tests of several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets


@contextmanager
def data_sets_cached_in(root: Path) -> Iterator[None]:
    """Inside, `datasets` keeps what it has read in `root`, and prints no bars."""
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, root / "cache"
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = before


def one_step(directory: Path) -> list[str]:
    """Options of `hf-qat train` for one step at a learning rate of 0, with what it writes in `directory`."""
    arguments = ["--output_dir", str(directory), "--max_steps", "1", "--learning_rate", "0", "--use_cpu"]
    return [*arguments, "--save_strategy", "no", "--disable_tqdm", "True", "--report_to", "none"]


def last_json(printed: str) -> dict[str, float]:
    """The metrics at the end of what a command has printed."""
    found: dict[str, float] = json.loads(printed[printed.index("{") :])
    return found
