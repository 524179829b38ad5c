"""A model that is compiled runs as it is written while it is looked at.

A compiler does not ask about the hooks, observers and attributes that modules get for a while, so that what it has
compiled before goes on computing without them; and where it does ask, it compiles everything anew for a single run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import OptimizedModule


Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Stance:
    """The compiler's, which threads share: the last of those that are inside puts it back.

    Attributes:
        inside: how many there are.
        before: gives back the stance of before.
    """

    inside: int = 0
    before: ExitStack = field(default_factory=ExitStack)
    lock: threading.Lock = field(default_factory=threading.Lock)


_STANCE = _Stance()


@contextmanager
def in_eager_mode() -> Iterator[None]:
    """Inside, nothing is compiled, and nothing that was compiled is used, in all threads; a decorator, too."""
    with _STANCE.lock:
        if _STANCE.inside == 0:
            _STANCE.before.enter_context(torch.compiler.set_stance("force_eager"))
        _STANCE.inside += 1
    try:
        yield
    finally:
        with _STANCE.lock:
            _STANCE.inside -= 1
            if _STANCE.inside == 0:
                _STANCE.before.close()


def uncompiled(model: Model) -> Model:
    """What `torch.compile(model)` was given, with its class and its paths; any other model is itself."""
    given: Any = model
    inner: Model = given._orig_mod if isinstance(model, OptimizedModule) else given
    return inner
