"""Random numbers that are not torch's: a graph would hold for good those that were drawn while it was made."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hf_qat.errors import CaptureError
from hf_qat.graph.random_state import random_state_kept


@contextmanager
def refusing_foreign_random_numbers(name: str) -> Iterator[None]:
    """Inside, nothing may draw from Python's `random` or numpy's global state; both stay as they are, torch's too.

    Args:
        name: of what is exported inside, for the message.

    Raises:
        CaptureError: something did: LayerDrop by `random.random()`, for instance.
    """
    with random_state_kept():
        python, legacy_numpy = random.getstate(), np.random.get_state()
        yield
        by_python = random.getstate() != python
        by_numpy = any(not np.array_equal(a, b) for a, b in zip(np.random.get_state(), legacy_numpy, strict=True))
    if by_python or by_numpy:
        raise CaptureError(
            f"{name} draws random numbers of {'Python' if by_python else 'numpy'}, which a graph would repeat at "
            "every call: it runs in its own Python code. Draw them by torch.rand to have it captured."
        )
