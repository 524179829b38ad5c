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


def last_json(printed: str) -> dict[str, float]:
    """The metrics at the end of what a command has printed."""
    found: dict[str, float] = json.loads(printed[printed.index("{") :])
    return found
