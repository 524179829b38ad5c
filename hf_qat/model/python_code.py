"""What a prepared model still computes in its own Python code, outside all graphs: there, nothing is quantized."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from hf_qat.graph.capture.inputs import Inputs, device_of, with_batch
from hf_qat.graph.capture.modes import buffers_kept, evaluating
from hf_qat.graph.captured import CapturedModule


logger = logging.getLogger(__name__)

#: Functions that convolve, multiply by a weight, or multiply two activations.
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
LAYERS = frozenset({"linear", *CONVOLUTIONS})
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"})
ATTENTION = "multi_head_attention_forward"

#: Why they stay in float.
REASON = "Python code that is not captured"


def operations_in_python(
    model: nn.Module, captured: Mapping[str, CapturedModule], inputs: Inputs, excluded: Callable[[str], bool]
) -> list[tuple[str, str, str]]:
    """`(module path, operation, reason)` of every layer and product that runs outside the captured children.

    Args:
        model: captured, and not changed otherwise yet; it is run once, unless its own code is that of a task model,
            around the children that it calls.
        captured: its captured children by path.
        inputs: that it was captured with.
        excluded: says of a path whether it stays float on purpose; such a module is not looked into.
    """
    if not _may_compute(model, captured, excluded):
        return []
    args, kwargs = with_batch(inputs, 1, device_of(model))
    noted: list[tuple[str, str]] = []
    try:
        with evaluating(model), buffers_kept(model), torch.no_grad(), _noting(model, noted):
            model(*args, **kwargs)
    except Exception as error:
        logger.debug("The model does not run on one image (%s).", error)
    return [(path, name, REASON) for path, name in dict.fromkeys(noted) if not excluded(path)]


def _may_compute(model: nn.Module, captured: Mapping[str, CapturedModule], excluded: Callable[[str], bool]) -> bool:
    """Whether a module was opened to capture what it calls, or has parameters that no captured child has."""
    if "" in captured:
        return False
    inside = {id(parameter) for module in captured.values() for parameter in module.parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    return any("." in path for path in captured) or not all(excluded(name.rpartition(".")[0]) for name in outside)


@contextmanager
def _noting(model: nn.Module, noted: list[tuple[str, str]]) -> Iterator[None]:
    """Inside, the functions that are called outside captured children are added to `noted`."""
    paths = {id(module): path for path, module in model.named_modules()}
    entered: list[nn.Module] = [model]

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop()

    def note(name: str) -> None:
        if not any(isinstance(module, CapturedModule) for module in entered):
            noted.append((paths.get(id(entered[-1]), ""), name))

    leaving = register_module_forward_hook(leave, always_call=True)
    with register_module_forward_pre_hook(enter), leaving, _Functions(note):
        yield


class _Functions(TorchFunctionMode):
    """Tells of each layer and product that is computed."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_").removesuffix("_")
        if name in LAYERS or name in PRODUCTS or name == ATTENTION:
            self._note(name)
        return func(*args, **(kwargs or {}))
