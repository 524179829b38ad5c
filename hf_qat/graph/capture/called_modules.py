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

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


def opened_by_callers(model: nn.Module, search: Search, called: Collection[str]) -> Search:
    """`search`, with the parts opened that are never called themselves, while modules inside them are.

    `DetrForSegmentation` calls the backbone, the encoder and the decoder of the detector inside it one by one.
    """
    opened = set(search.opened)
    for path in called:
        around = [path[:dot] for dot, letter in enumerate(path) if letter == "."]
        outermost = next((part for part in around if part in called), path)
        opened |= {
            part
            for part in around
            if len(part) < len(outermost)
            and not search.excluded(part)
            and not isinstance(model.get_submodule(part), (nn.ModuleList, nn.ModuleDict))
        }
    return search if opened == set(search.opened) else replace(search, opened=frozenset(opened))
