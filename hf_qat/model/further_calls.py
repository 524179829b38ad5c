"""Calls that a prepared model did not see before: other options (flags), such as `output_hidden_states=True`.

They are captured as they come, on a float copy that has the parameters of the model, and the same passes make of that
a graph over the modules and the quantizers of the model. It gets no parameter by that: the optimizer, and what wraps
the model for several processes, know all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CaptureError
from hf_qat.graph.call_signature import CallSignature
from hf_qat.graph.capture.capture import MAX_GRAPHS, FurtherCall, Parts, capture
from hf_qat.graph.capture.inputs import BATCH_SIZES, Inputs, TwoSizes, device_of, repeated
from hf_qat.graph.capture.meta_device import META, without_weights
from hf_qat.graph.capture.ways import random_like
from hf_qat.graph.captured import CapturedModule, captured_modules
from hf_qat.graph.captured_graph import CapturedGraph
from hf_qat.graph.nodes import CONSTANT_PREFIX
from hf_qat.graph.one_at_a_time import TURN
from hf_qat.graph.passes.fuse import fuse
from hf_qat.graph.passes.place import place
from hf_qat.graph.passes.rewrite import rewrite
from hf_qat.graph.passes.synchronize import synchronize
from hf_qat.graph.random_state import random_state_kept
from hf_qat.model.plan import make_plan


logger = logging.getLogger(__name__)


@dataclass
class FurtherCalls:
    """Captures calls of the parts of a prepared model that were not seen when it was prepared.

    Attributes:
        model: prepared.
        float_model: what it was before, without weights.
        config: the recipe.
        inputs: two of the example inputs, without labels.
    """

    model: nn.Module
    float_model: nn.Module
    config: QATConfig
    inputs: Inputs | TwoSizes

    @classmethod
    def of(cls, model: nn.Module, config: QATConfig, inputs: Inputs | TwoSizes) -> FurtherCalls:
        """For `model`, which is about to be captured."""
        return cls(model, without_weights(model), config, _two_of(inputs))

    def __call__(self, module: CapturedModule, call: CallSignature, tensors: Sequence[Tensor]) -> CapturedGraph:
        """A graph of `call` over the modules and quantizers of the part `module`, in its mode.

        Args:
            module: a captured part of the model.
            call: as captured ones but for what is no tensor.
            tensors: of the call.

        Raises:
            CaptureError: the call cannot become a graph, or changes where quantizers stand.
        """
        if len(module.graphs) >= MAX_GRAPHS:
            raise CaptureError(f"it is called in {MAX_GRAPHS} ways already, each of which has a graph.")
        path = next(path for path, part in self.model.named_modules() if part is module)
        twin = _with_tensors_of(self.model, copy.deepcopy(self.float_model))
        with TURN, _as_when_prepared(self.model):
            part = self._captured(twin, FurtherCall(path, module.training, _of_two_sizes(module, call, tensors)))
        if _decisions(part) != _decisions(module):
            raise CaptureError("quantizers would stand elsewhere than those that the model has.")
        logger.info("%s is called with other options than before, and has one more graph.", path or type(module))
        return _adopted(module, part)

    def _captured(self, twin: nn.Module, further: FurtherCall) -> CapturedModule:
        """The part of the float copy that is called so, captured and quantized as the model was."""
        ours = captured_modules(self.model)
        labelled = {
            path: [(graph.training, graph.labelled_calls) for graph in part.graphs if graph.labelled_calls]
            for path, part in ours.items()
        }
        inputs = _with_values(self.inputs)
        first = inputs.first if isinstance(inputs, TwoSizes) else inputs
        parts = Parts(self.config.excludes, list(ours), further.training, labelled, further)
        captured = capture(twin, inputs, parts)
        plan = make_plan(twin, captured, self.config, first)
        rewrite(captured)
        fuse(captured, plan)
        place(captured, plan)
        return captured[further.path]


def _two_of(inputs: Inputs | TwoSizes) -> Inputs | TwoSizes:
    """Copies of the first two; tensors without values stay so."""
    if isinstance(inputs, TwoSizes):
        return TwoSizes(_two_of(inputs.first), _two_of(inputs.other))  # type: ignore[arg-type]
    two: Inputs = pytree.tree_map_only(Tensor, lambda x: (x[:2] if x.dim() else x).detach().clone(), inputs)
    return two


def _with_values(inputs: Inputs | TwoSizes) -> Inputs | TwoSizes:
    """Random numbers for the tensors without values: of a model that was loaded, only the shapes are known."""
    if isinstance(inputs, TwoSizes):
        return TwoSizes(_with_values(inputs.first), _with_values(inputs.other))  # type: ignore[arg-type]
    given: Inputs = pytree.tree_map_only(Tensor, random_like, inputs)
    return given


def _with_tensors_of(model: nn.Module, twin: nn.Module) -> nn.Module:
    """`twin` with the parameters and buffers of `model`, the very ones, and in its modes; in place."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in twin.named_modules(remove_duplicate=False):
        if path in modules:
            ours = modules[path]
            module.training = ours.training
            for mine, theirs in ((module._parameters, ours._parameters), (module._buffers, ours._buffers)):
                mine.update({name: theirs[name] for name in mine if name in theirs})
    return twin


@contextmanager
def _as_when_prepared(model: nn.Module) -> Iterator[None]:
    """Inside, no mixed precision and no inference mode of the caller's is captured; random numbers come back."""
    device = device_of(model)
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), random_state_kept(device):
        yield


def _of_two_sizes(
    module: CapturedModule, call: CallSignature, tensors: Sequence[Tensor]
) -> list[tuple[list[Any], dict[str, Any]]]:
    """`call` at the two sizes of a batch that the part was captured with, of tensors without values.

    Integers and masks keep theirs, which code may ask for: Siglip 2 is told how many patches an image has.
    """
    captured = next(graph for graph in module.graphs if graph.training == module.training)
    if [x.dim() for x in tensors] != [len(shape) for shape in captured.shapes]:
        raise CaptureError("its tensors have another number of axes.")
    calls = []
    for size in BATCH_SIZES:
        resized = []
        for tensor, shape, node in zip(tensors, captured.shapes, captured.inputs(), strict=True):
            example = node.meta["val"]
            sizes = [
                int(example.shape[d]) * size // BATCH_SIZES[0] if n is None else tensor.shape[d]
                for d, n in enumerate(shape)
            ]
            without_values = tensor.is_floating_point() or not tensor.numel()
            resized.append(
                torch.empty(sizes, dtype=example.dtype, device=META) if without_values else _repeated(tensor, sizes)
            )
        calls.append(call.rebuild(resized))
    return calls


def _repeated(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """`tensor` repeated or cut to `sizes` along its axes."""
    for axis, size in enumerate(sizes):
        tensor = repeated(tensor, size, axis)
    return tensor


def _decisions(module: CapturedModule) -> list[tuple[str, str]]:
    """What the graph of evaluation calls: layers, what is folded into them, and quantizers."""
    return [(node.op, str(node.target)) for node in module.graph.nodes]


def _adopted(module: CapturedModule, twin: CapturedModule) -> CapturedGraph:
    """The last graph of `twin`, which computes the same in float, as one of `module`."""
    made = twin.graphs[-1]
    made.labelled_calls = []
    names: dict[str, str] = {}
    for node in made.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name.startswith(CONSTANT_PREFIX):
            if name not in names:
                names[name] = _constant(module, getattr(twin, name))
            node.target = names[name]
    made.recompile()
    synchronize(module, [made])
    return made


def _constant(module: CapturedModule, value: Tensor) -> str:
    """The name of a constant of `module` with this value; it gets one if it has none."""
    constants = {name: buffer for name, buffer in module._buffers.items() if name.startswith(CONSTANT_PREFIX)}
    for name, known in constants.items():
        if known is not None and known.dtype == value.dtype and torch.equal(known, value):
            return name
    name = f"{CONSTANT_PREFIX}{len(constants)}"
    module.register_buffer(name, value, persistent=False)
    return name
