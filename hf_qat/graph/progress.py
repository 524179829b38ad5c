"""Progress bars, as transformers has them, and a line in the log on what took how long.

A bar is drawn on a terminal only, and not after transformers' `logging.disable_progress_bar()`; it stays when it is
full. The line is of level info.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from transformers.trainer_utils import has_length
from transformers.utils import logging


logger = logging.get_logger(__name__)

_HIDDEN = ContextVar("hf_qat_bars_hidden", default=False)


class Bar(Protocol):
    """What is under way."""

    def update(self, n: int = 1) -> object:
        """So many more are done."""


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Bar]:
    """Inside, a bar that its `update` moves; afterwards, unless something was raised, the line in the log.

    Args:
        what: is under way, as `Calibrating`.
        total: how many there are; `None` if that is not known.
        unit: of what, in the singular.
    """
    start = time.monotonic()
    with logging.tqdm(desc=what, total=total, unit=unit, disable=True if _HIDDEN.get() else None) as bar:
        yield bar
    logger.info(f"{what} took {time.monotonic() - start:.1f} s.")


@contextmanager
def bars_hidden(hidden: bool) -> Iterator[None]:
    """Inside, no bar is drawn, if `hidden`."""
    token = _HIDDEN.set(hidden or _HIDDEN.get())
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def length_of(things: object, limit: int | None = None) -> int | None:
    """How many there are, or `limit` if that is fewer; `None` where nobody knows."""
    known = [len(things)] if has_length(things) else []
    return min([*known, *([] if limit is None else [limit])], default=None)
