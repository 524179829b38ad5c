"""Which modules a model calls, itself or through others: some call what is inside a part, and never the part."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_qat.graph.capture.call_record import Search


@contextmanager
def called_modules(model: nn.Module) -> Iterator[set[str]]:
    """Inside, the paths of the modules that are called are added to what is given."""
    paths = {id(module): path for path, module in model.named_modules()}
    called: set[str] = set()

    def note(module: nn.Module, args: Any) -> None:
        if id(module) in paths:
            called.add(paths[id(module)])

    with register_module_forward_pre_hook(note):
        yield called


def opened_by_callers(model: nn.Module, search: Search, called: Collection[str]) -> Search:
    """`search`, with the parts opened that are never called themselves, while modules inside them are.

    `DetrForSegmentation` calls the backbone, the encoder and the decoder of the detector inside it one by one, and a
    stage of ResNet the layers of its `nn.Sequential`.
    """
    opened = set(search.opened)
    for path in called:
        opened |= _never_called_around(model, path, search, called)
    return search if opened == set(search.opened) else replace(search, opened=frozenset(opened))


def _never_called_around(model: nn.Module, path: str, search: Search, called: Collection[str]) -> set[str]:
    """Of the modules around `path`, from the outside to the first one that is a part, those that are not called."""
    found = set()
    for part in (path[:dot] for dot, letter in enumerate(path) if letter == "."):
        if part in search.opened or isinstance(model.get_submodule(part), (nn.ModuleList, nn.ModuleDict)):
            continue
        if part in called or search.excluded(part):
            break
        found.add(part)
    return found
