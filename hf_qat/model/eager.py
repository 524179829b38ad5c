"""A model that is compiled runs as it is written while it is looked at.

A compiler does not ask about the hooks, observers and attributes that modules get for a while, so that what it has
compiled before goes on computing without them; and where it does ask, it compiles everything anew for a single run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import OptimizedModule


Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def in_eager_mode() -> Iterator[None]:
    """Inside, nothing is compiled, and nothing that was compiled is used; a decorator, too."""
    with torch.compiler.set_stance("force_eager"):
        yield


def uncompiled(model: Model) -> Model:
    """What `torch.compile(model)` was given, with its class and its paths; any other model is itself."""
    given: Any = model
    inner: Model = given._orig_mod if isinstance(model, OptimizedModule) else given
    return inner
