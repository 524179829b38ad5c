"""The hooks that a user has put on modules; no graph calls those on what is inside a captured part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


#: Where hooks come from that a graph contains or does not need; others of transformers (NEFTune, debugging) change or
#: show what layers give, as those of a user do.
CONTAINED_HOOKS = ("torch.nn.utils.", "transformers.utils.output_capturing", "transformers.modeling_utils", "hf_qat.")


def user_hooks(module: nn.Module) -> list[object]:
    """The hooks on a module, other than those whose work a graph contains, or that it does not need.

    Weight norm, spectral norm and pruning compute weights in hooks; transformers collects hidden states by them, and
    lets embeddings require gradients. Ours are on what a graph calls, and are gone after a pass.
    """
    return [hook for kind in _hooks(module) for hook in kind.values() if _is_of_user(hook)]


@contextmanager
def without_user_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, they are not called: a captured module's own go on being called around its graph, which is without."""
    kept = [(kind, dict(kind)) for kind in _hooks(module)]
    try:
        for kind, before in kept:
            for key, hook in before.items():
                if _is_of_user(hook):
                    del kind[key]
        yield
    finally:
        for kind, before in kept:
            kind.clear()
            kind.update(before)


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [kind for kind in kinds if kind]


def _is_of_user(hook: object) -> bool:
    return not _origin(hook).startswith(CONTAINED_HOOKS)


def _origin(hook: object) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)
