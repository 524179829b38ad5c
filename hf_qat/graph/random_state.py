"""Random numbers drawn on the side, so that what follows sees those that it would have seen without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(*devices: torch.device) -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards Python, numpy and torch (CPU and `devices`) go on as before."""
    python, legacy_numpy = random.getstate(), np.random.get_state()
    try:
        # Without a list, torch asks all GPUs of the machine, and warns where there are several.
        with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)
