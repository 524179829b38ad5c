"""Dropout that follows `train()` and `eval()` again: the exporter has frozen it in evaluation mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from hf_qat.graph.capture.training_run import in_training
from hf_qat.graph.nodes import MODULE_PATH


logger = logging.getLogger(__name__)

aten = torch.ops.aten

DROPOUTS: dict[Any, type[nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
}

FUNCTIONS = {nn.functional.dropout, nn.functional.dropout2d, nn.functional.alpha_dropout}


class TrainingProbabilities:
    """The probabilities that functional dropouts have in training.

    Attention writes `dropout(x, p=0.0 if not self.training else p)`, which an export in evaluation mode sees as 0.
    They are read off one forward in training mode, which is made only if they are asked for.

    Args:
        model: a module on which, as on a copy of it, `run` works.
        run: runs a module once on example inputs.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        self._model, self._run = model, run

    def of(self, module: nn.Module, ordinal: int) -> float:
        """Probability of the `ordinal`-th functional dropout in the forward of `module`; 0 if there is none."""
        seen = self._table.get(module, [])
        return seen[ordinal] if ordinal < len(seen) else 0.0

    @cached_property
    def _table(self) -> dict[nn.Module, list[float]]:
        table = in_training(self._model, self._observe)
        if table is None:
            logger.warning(
                "The model does not run in training mode on the example inputs; functional dropouts whose probability "
                "depends on the mode stay off."
            )
        return table or {}

    def _observe(self, model: nn.Module) -> dict[nn.Module, list[float]]:
        recorder = _Recorder()
        with recorder.watching_modules(), recorder:
            self._run(model)
        pairs = zip(model.modules(), self._model.modules(), strict=True)
        return {ours: recorder.probabilities.get(id(theirs), []) for theirs, ours in pairs}


class _Recorder(TorchFunctionMode):
    """Notes every functional dropout under the module whose forward calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: dict[int, list[float]] = {}
        self._stack: list[nn.Module] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS and self._stack:
            probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", args[2] if len(args) > 2 else True)
            self.probabilities.setdefault(id(self._stack[-1]), []).append(float(probability) if training else 0.0)
        return func(*args, **kwargs)

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        before = module_hooks.register_module_forward_pre_hook(lambda module, args: self._stack.append(module))
        after = module_hooks.register_module_forward_hook(
            lambda module, args, output: (self._stack.pop(), None)[1], always_call=True
        )
        try:
            yield
        finally:
            before.remove()
            after.remove()


def revive_dropout(graph: fx.Graph, child: nn.Module, probabilities: TrainingProbabilities) -> None:
    """Replace each frozen dropout by a call of the model's own dropout module, or of a new one in its place.

    A functional dropout becomes a module `dropout_<k>` of the module that calls it; with probability 0 it goes.
    """
    ordinals: dict[str, int] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in DROPOUTS:
            continue
        path = node.meta[MODULE_PATH]
        ordinal = ordinals[path] = ordinals.get(path, -1) + 1
        target = _dropout_module(child, path, ordinal, node, probabilities)
        replacement = node.args[0]
        if target is not None:
            with graph.inserting_before(node):
                replacement = graph.create_node("call_module", target, (node.args[0],), {})
            replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)


def _dropout_module(
    child: nn.Module, path: str, ordinal: int, node: fx.Node, probabilities: TrainingProbabilities
) -> str | None:
    """Path of the module to call, made if need be; `None` for a probability of 0."""
    owner = child.get_submodule(path)
    if isinstance(owner, nn.modules.dropout._DropoutNd):
        return path
    captured = float(node.args[1] if len(node.args) > 1 else node.kwargs["p"])  # type: ignore[arg-type]
    probability = captured or probabilities.of(owner, ordinal)
    if probability == 0.0:
        return None
    name = f"dropout_{ordinal}"
    owner.add_module(name, DROPOUTS[node.target](probability).train(owner.training))
    return f"{path}.{name}" if path else name
