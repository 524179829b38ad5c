"""Gradient checkpointing of a captured graph: its blocks are computed again in backward, from what came into them.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", §4. Transformers marks the layers that it would
call so, `GradientCheckpointingLayer`s with `gradient_checkpointing = True`; a graph calls no such layers, but knows
which of its nodes are theirs. What moves in training (running statistics, ranges that follow the data) moves once, and
a block is computed again by what it was computed by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_qat.errors import StageError
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.nodes import output_values
from hf_qat.graph.plan import join_path
from hf_qat.graph.segments import Segment
from hf_qat.quantization.layers import QATLayer, folded_ahead
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.running_graph import running_graph
from hf_qat.quantization.saved_codes import Kept, kept_for_backward


#: What `torch._C._current_graph_task_id` gives outside of a backward pass.
NO_BACKWARD = -1


def is_marked(module: nn.Module) -> bool:
    """Whether transformers, or a user, has marked it to be computed again in backward, it or the layers in it."""
    return bool(vars(module).get("gradient_checkpointing"))


def computes_itself_again(module: nn.Module) -> bool:
    """Whether it is a layer of the kind that transformers marks, which sees to it in its own forward."""
    return isinstance(module, GradientCheckpointingLayer)


def checkpointed_blocks(modules: Mapping[str, nn.Module]) -> dict[str, bool]:
    """Path of each block → whether it is marked; empty where none is.

    Args:
        modules: a captured module, at the path `""`, and all that are inside it.
    """
    layers = [path for path, module in modules.items() if computes_itself_again(module)]
    blocks = {path: is_marked(modules[path]) for path in layers}
    for path, module in modules.items():
        has_layers = any(layer.startswith(f"{path}." if path else "") for layer in layers)
        if is_marked(module) and path not in layers and not has_layers:
            blocks |= {join_path(path, item): True for item in _items_of_lists(module)}
    return blocks if any(blocks.values()) else {}


def _items_of_lists(module: nn.Module) -> Iterator[str]:
    """Paths of what a module that marks itself, not its layers, loops over."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{name}.{item}" for item, _ in child.named_children())


def require_still(owner: nn.Module, modules: Iterable[nn.Module]) -> None:
    """To be called where `owner` computes with `modules` in training.

    Raises:
        StageError: a checkpoint around it, not of a block inside, computes it again in backward, and something would
            move a second time: it would be computed by other numbers than in forward.
    """
    if torch._C._current_graph_task_id() == NO_BACKWARD:
        return
    modules = list(modules)
    layers = [module for module in modules if isinstance(module, QATLayer)]
    folded = {layer.batch_norm for layer in layers}
    live = any(layer.has_live_norm() for layer in layers)
    if live or any(_moves(module) for module in modules if module not in folded):
        raise StageError(
            f"a checkpoint around {type(owner).__name__} computes it again in backward, while batch norms or ranges "
            "follow the data: they would move twice, and gradients be those of other numbers. Use "
            "model.gradient_checkpointing_enable(), or set gradient_checkpointing = True on what loops over the "
            "blocks, or freeze first: freeze_batch_norm(model), freeze_ranges(model)."
        )


def compute_checkpointed(
    owner: nn.Module, captured: CapturedGraph, tensors: Sequence[Tensor], blocks: Mapping[str, bool], kept: Kept
) -> Any:
    """As `CapturedGraph.compute`, in training, with the marked ones among `blocks` computed again in backward.

    Args:
        owner: whose graph it is.
        captured: the graph.
        tensors: its inputs.
        blocks: as `checkpointed_blocks` gives them, one marked at least.
        kept: what is kept of quantized tensors between the blocks.
    """
    values: dict[str, Any] = {node.name: tensor for node, tensor in zip(captured.inputs(), tensors, strict=True)}
    for segment in captured.segments(tuple(blocks)):
        arguments = [values[name] for name in segment.reads]
        if segment.block is not None and blocks[segment.block]:
            found = checkpoint(_Block(owner, segment), *arguments, use_reentrant=False)
        else:
            with kept_for_backward(kept):
                found = _run(owner, segment, arguments)
        for name in segment.forgets:
            del values[name]
        values |= zip(segment.gives, found, strict=True)
    return captured.rebuild(
        values[value.name] if isinstance(value, fx.Node) else value for value in output_values(captured.graph)
    )


def _run(owner: nn.Module, segment: Segment, arguments: Sequence[Any]) -> tuple[Any, ...]:
    called = [owner.get_submodule(path) for path in sorted(segment.called)]
    with running_graph(), folded_ahead([module for module in called if isinstance(module, QATLayer)]):
        found: tuple[Any, ...] = segment.run(owner, *arguments)
        return found


class _Block:
    """A segment that is called a second time in backward, with what moves in training as at the first time."""

    def __init__(self, owner: nn.Module, segment: Segment) -> None:
        self._owner, self._segment = owner, segment
        self._modules = _called_modules(owner, segment)
        self._switches = _switches(self._modules)
        moving = [buffer for module in self._modules if _moves(module) for buffer in module.buffers(recurse=False)]
        self._before = [(buffer, buffer.clone()) for buffer in moving]
        self._is_again = False

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        if not self._is_again:
            self._is_again = True
            return _run(self._owner, self._segment, arguments)
        if _switches(self._modules) != self._switches:
            raise StageError(
                f"{self._segment.block} is computed again in backward, by gradient checkpointing, and quantizers, "
                "batch norms or modes were switched since its forward: call backward() before train(), eval(), "
                "freeze_ranges(), freeze_batch_norm(), schedule.step() or the end of fake_quant_disabled()."
            )
        with _as_it_was(self._before):
            return _run(self._owner, self._segment, arguments)


def _called_modules(owner: nn.Module, segment: Segment) -> list[nn.Module]:
    """All that a segment computes with: what it calls, what is inside that, and the batch norms of layers."""
    modules: dict[nn.Module, None] = {}
    for path in sorted(segment.called):
        for module in owner.get_submodule(path).modules():
            norm = module.batch_norm if isinstance(module, QATLayer) else None
            modules |= dict.fromkeys(found for found in (module, norm) if found is not None)
    return list(modules)


def _switches(modules: Iterable[nn.Module]) -> list[tuple[bool, ...]]:
    names = ("training", "enabled", "waits", "frozen", "batch_norm_frozen")
    return [tuple(bool(getattr(module, name, False)) for name in names) for module in modules]


def _moves(module: nn.Module) -> bool:
    """Whether a call in training changes its buffers: running statistics, and ranges that follow the data."""
    if isinstance(module, FakeQuantize):
        return module.tracks_range and not module.frozen
    return isinstance(module, _BatchNorm) and module.training and not getattr(module, "batch_norm_frozen", False)


@contextmanager
def _as_it_was(before: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, buffers have other values; past the counts of versions, as afterwards all is as it is now."""
    now = [buffer.clone() for buffer, _ in before]
    _set(before)
    try:
        yield
    finally:
        _set(zip((buffer for buffer, _ in before), now, strict=True))


@torch.no_grad()
def _set(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in values:
        buffer.data.copy_(value)
