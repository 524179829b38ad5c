"""The registry of observers: the ways in which calibration finds a range, by the names that a recipe gives them.

It lies here, in the lowest room that knows the names; `hf_qat.quantization.observers`, which `import hf_qat` loads,
puts ours in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hf_qat.errors import ConfigError


#: Every observer, a subclass of `hf_qat.quantization.observers.Observer`, by its name in recipes.
OBSERVERS: dict[str, type[Any]] = {}

_Class = TypeVar("_Class", bound=type[Any])


def register_observer(name: str) -> Callable[[_Class], _Class]:
    """Class decorator that enters an `Observer` under `name`, which recipes then know.

    Raises:
        ConfigError: the name is taken.
    """

    def register(cls: _Class) -> _Class:
        if name in OBSERVERS:
            raise ConfigError(f"an observer named {name!r} exists already: {OBSERVERS[name].__qualname__}")
        OBSERVERS[name] = cls
        return cls

    return register
