"""Put a model back into the state it was in, whatever a change that failed halfway has done to it.

What counts as state: the class of every module, its attributes, and the entries of the dicts and sets among these:
parameters, buffers, submodules and hooks; and the settings of the config that a Hugging Face model has. The values of
tensors are not copied: no pass of `prepare_qat` writes to one that was there before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """What is raised inside, Ctrl-C too, leaves `model` as it was."""
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    owners = [*modules, *_configs(modules)]
    attributes = [dict(vars(owner)) for owner in owners]
    contents = [
        {name: copy.copy(value) for name, value in kept.items() if isinstance(value, (dict, set))}
        for kept in attributes
    ]
    try:
        yield
    except BaseException:
        for module, cls in zip(modules, classes, strict=True):
            module.__class__ = cls
        for owner, kept, containers in zip(owners, attributes, contents, strict=True):
            _refill(vars(owner), kept)
            for name, entries in containers.items():
                _refill(kept[name], entries)
        raise


def _configs(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    """The configs of all modules, and the configs inside these, each once."""
    found: dict[int, PreTrainedConfig] = {}
    waiting: list[Any] = [getattr(module, "config", None) for module in modules]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return list(found.values())


def _refill(target: Any, entries: Any) -> None:
    """The same dict or set, because handles of hooks refer to it, with the entries and the order that it had."""
    target.clear()
    target.update(entries)
