"""The captured module: the child itself, its class exchanged for one that runs FX graphs behind the same signature.

Parameters, buffers, submodules and attributes stay where they were, so state-dict keys, `config`, `isinstance` and
whatever outer code reads of the child go on working. There is a graph for each way in which it is called, in
evaluation and in training, over the same parameters, layers and quantizers.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from hf_qat.errors import CaptureError, StageError, listed
from hf_qat.graph.call_signature import CallSignature, flatten_call
from hf_qat.graph.captured_graph import CapturedGraph, fits_shape
from hf_qat.graph.checkpointing import (
    checkpointed_blocks,
    compute_checkpointed,
    computes_itself_again,
    is_marked,
    require_still,
)
from hf_qat.graph.nodes import short_name
from hf_qat.graph.user_hooks import user_hooks
from hf_qat.quantization.class_swap import MADE_BY, forget_own_forward, swap_class
from hf_qat.quantization.ddp_calls import require_gradients
from hf_qat.quantization.float32_arithmetic import float32_arithmetic
from hf_qat.quantization.layers import QATLayer, folded_ahead, quantizers_in_graphs
from hf_qat.quantization.onnx_ops import exporting_to_onnx
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.saved_codes import Kept, kept_for_backward


logger = logging.getLogger(__name__)

#: Modules in a graph that look at their own mode.
FOLLOW_THEIR_MODE = (nn.modules.batchnorm._BatchNorm, QATLayer, FakeQuantize)


class CaptureCall(Protocol):
    """Captures a call of a prepared model's part that was not seen when the model was prepared."""

    def __call__(self, module: CapturedModule, call: CallSignature, tensors: Sequence[Tensor]) -> CapturedGraph:
        """A graph of the call, over the modules and quantizers that `module` has; `CaptureError` if there is none."""


class Place(NamedTuple):
    """Where a module is registered: below a captured module at `path`, and directly in `parent` under `name`.

    Attributes:
        follows_its_mode: it looks at its own mode, whatever that of the graph is.
        dropout: the probability that stands in the graph of training; `None` if it is no dropout.
    """

    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    follows_its_mode: bool
    dropout: float | None

    def is_intact(self) -> bool:
        """Whether it is still there."""
        return self.parent._modules.get(self.name) is self.module


class CapturedModule(nn.Module):
    """Mixed into the class of a captured child by `install`.

    Attributes:
        graphs: one for each way to call it; the first one is for evaluation.
        producer_of_input: input position → (child, output position): which output of an earlier child comes in there.
        incoming_quantizer: input position → (child, path) of the quantizer that the input carries already.
        output_quantizers: a path below the child per output, `None` where none is carried.
        float_operations: what stays float, and why.
        saves_memory: keep the codes of quantized tensors for backward, not the tensors.
        capture_call: makes a graph of a call with other options (flags) than those that were captured; `None`: such
            a call is refused.
        places: where each module inside is registered; a graph calls, and reads the parameters of, these very ones.
    """

    graphs: list[CapturedGraph]
    producer_of_input: dict[int, tuple[str, int]]
    incoming_quantizer: dict[int, tuple[str, str]]
    output_quantizers: list[str | None]
    float_operations: list[tuple[str, str, str]]
    places: list[Place]
    saves_memory: bool = False
    capture_call: CaptureCall | None = None
    _python_signature: inspect.Signature
    _warned_of: set[str]

    @property
    def evaluation(self) -> CapturedGraph:
        """The graph of evaluation, on which all decisions about quantization are made."""
        return self.graphs[0]

    @property
    def graph(self) -> fx.Graph:
        """The graph of evaluation."""
        return self.evaluation.graph

    @property
    def signature(self) -> CallSignature:
        """The call that was captured in evaluation."""
        return self.evaluation.signature

    @property
    def shapes(self) -> list[tuple[int | None, ...]]:
        """Per input the sizes captured in evaluation."""
        return self.evaluation.shapes

    def extra_repr(self) -> str:
        """That of the original class, and what of the graph stays in float: `in float: 2 add, 1 where`."""
        counts = Counter(short_name(operation) for _, operation, _ in self.float_operations)
        in_float = f"in float: {', '.join(f'{count} {name}' for name, count in counts.items())}" if counts else ""
        return ", ".join(part for part in (super().extra_repr(), in_float) if part)

    def recompile(self) -> None:
        """Generate the Python functions of all graphs anew."""
        for captured in self.graphs:
            captured.recompile()

    def run_graph(self, *args: Any, **kwargs: Any) -> Any:
        """Take the tensors out of the call, run the graph, and rebuild the result of the original forward."""
        if exporting_to_onnx() and any(_rounds(place.module) for place in self.places):
            _warn_of_export(self)
        call, tensors = flatten_call(self._python_signature, args, kwargs)
        captured = self._graph_for(call, tensors)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._check_places(captured)
            if self.training and torch.is_grad_enabled():
                require_gradients(self, self._without_gradient())
                require_still(self, (place.module for place in self.places))
        # Where gradients are followed, a part in evaluation is a frozen one in training: as fast as its surroundings.
        if tensors and not self.training and not torch.is_grad_enabled():
            with float32_arithmetic(tensors) as inputs:
                return captured.compute(self, inputs)
        if compiling:
            return captured.compute(self, tensors)
        kept = Kept.CODES if self.saves_memory else Kept.INPUTS
        if self.training and torch.is_grad_enabled() and (blocks := self._checkpointed_blocks(captured)):
            return compute_checkpointed(self, captured, tensors, blocks, kept)
        with kept_for_backward(kept), folded_ahead(self._layers_called(captured)):
            return captured.compute(self, tensors)

    def _checkpointed_blocks(self, captured: CapturedGraph) -> dict[str, bool]:
        """Blocks inside, of which those that are marked are to be computed again in backward; empty without such."""
        marked = is_marked(self) or any(is_marked(place.module) for place in self.places)
        if not marked or computes_itself_again(self):
            return {}
        blocks = checkpointed_blocks({"": self, **{place.path: place.module for place in self.places}})
        found = [segment.block for segment in captured.segments(tuple(blocks))] if blocks else []
        if any(block is not None and blocks[block] for block in found):
            return blocks
        if "checkpointing" not in self._warned_of:
            self._warned_of.add("checkpointing")
            logger.warning("Gradient checkpointing has no effect on %s: no block is marked.", type(self).__name__)
        return {}

    def _layers_called(self, captured: CapturedGraph) -> list[QATLayer]:
        return [p.module for p in self.places if p.path in captured.called and isinstance(p.module, QATLayer)]

    def _without_gradient(self) -> Iterator[nn.Parameter]:
        """What is learned elsewhere in training, and is not in the present phase."""
        for place in self.places:
            module = place.module
            if isinstance(module, FakeQuantize) and (module.frozen or not module.rounds):
                yield from module.parameters()
            elif isinstance(module, QATLayer) and module.leaves_scale_alone():
                yield from module.weight_quantizer.parameters()

    def _graph_for(self, call: CallSignature, tensors: Sequence[Tensor]) -> CapturedGraph:
        of_mode = [captured for captured in self.graphs if captured.training == self.training] or self.graphs[:1]
        for captured in of_mode:
            if captured.takes(self, call, tensors):
                return captured
        refused = _not_captured(type(self).__name__, of_mode[0], call, tensors)
        if self.capture_call is None or torch.compiler.is_compiling() or not _differs_in_options(of_mode[0], call):
            raise refused
        try:
            self.graphs.append(self.capture_call(self, call, tensors))
        except CaptureError as error:
            raise CaptureError(f"{refused} Captured as it came, it failed: {error}") from error
        return self.graphs[-1]

    def remember_places(self) -> None:
        """Take the modules that are inside now for those that belong there."""
        places = []
        for path, module in self.named_modules():
            if path:
                owner, _, name = path.rpartition(".")
                follows = isinstance(module, FOLLOW_THEIR_MODE)
                dropout = module.p if isinstance(module, _DropoutNd) else None
                places.append(Place(path, self.get_submodule(owner), name, module, follows, dropout))
        object.__setattr__(self, "places", places)

    def require_intact(self) -> None:
        """Raise `StageError` if a module inside was exchanged or removed after `remember_places`."""
        for place in self.places:
            if not place.is_intact():
                raise _exchanged(self, place)

    def _check_places(self, captured: CapturedGraph) -> None:
        """Compare the modules inside with what a graph was made of, in one walk: this is done at every call."""
        training, frozen, warned = captured.training, captured.frozen, self._warned_of
        for place in self.places:
            path, parent, name, module, follows_its_mode, dropout = place
            if parent._modules.get(name) is not module:
                raise _exchanged(self, place)
            if follows_its_mode:
                if "ranges" not in warned and _rounds(module):
                    warned.add("ranges")
                    _warn_of_ranges(self)
            elif (module.training is training) is (path in frozen) and "modes" not in warned:
                warned.add("modes")
                _warn_of_mode(self, place)
            if dropout is not None and training and module.p != dropout and "dropout" not in warned:
                warned.add("dropout")
                _warn_of_dropout(self, place)
            before, after = module._forward_pre_hooks or module._backward_pre_hooks, module._forward_hooks
            if (before or after or module._backward_hooks) and "hooks" not in warned and _has_lost_hooks(place):
                warned.add("hooks")
                _warn_of_hook(self, place)


def _exchanged(owner: CapturedModule, place: Place) -> StageError:
    return StageError(
        f"{place.path} of {type(owner).__name__} was exchanged or removed after prepare_qat: the graph, the "
        "quantizers and the optimizer know the one from before. Change the float model, then prepare it."
    )


def _has_lost_hooks(place: Place) -> bool:
    """Whether a user's hooks are on it that no graph calls as the user means; it calls quantizers of activations."""
    is_called = isinstance(place.module, FakeQuantize) and place.name != "weight_quantizer"
    return not is_called and bool(user_hooks(place.module))


def _warn_of_hook(owner: CapturedModule, place: Place) -> None:
    """A graph cannot follow hooks that the modules inside got after it was captured; it calls layers alone."""
    logger.warning(
        "A hook was added to a %s inside %s after prepare_qat: the captured graph computes in its place. It is not "
        "called, or on a convolution or linear layer with what comes out of the batch norm after it. Add hooks before "
        "prepare_qat.",
        type(place.module).__name__,
        type(owner).__name__,
    )


def _warn_of_mode(owner: CapturedModule, place: Place) -> None:
    """A graph is of one mode, but for parts that were frozen; batch norms, layers and quantizers look at their own."""
    logger.warning(
        "%s of %s is in %s, and the graph computes it as in %s: dropout in it, for instance, does not follow. Put a "
        "part that stays in evaluation there before prepare_qat, with the model in training; or use "
        "requires_grad_(False), and put its batch norms into evaluation.",
        place.path,
        type(owner).__name__,
        _mode_name(place.module.training),
        _mode_name(not place.module.training),
    )


def _warn_of_dropout(owner: CapturedModule, place: Place) -> None:
    """The probability is a number in the graph, or nothing at all where it was 0."""
    logger.warning(
        "%s of %s has the probability %s now, and the graph goes on with %s: set it before prepare_qat.",
        place.path,
        type(owner).__name__,
        place.module.p,
        place.dropout,
    )


def _rounds(module: nn.Module) -> bool:
    """Whether it is a quantizer that rounds by its range, instead of collecting one."""
    return isinstance(module, FakeQuantize) and module.rounds and module.observer is None


def _warn_of_export(owner: CapturedModule) -> None:
    """`torch.onnx.export` was called too early; an error would have it try again where nothing can be said."""
    logger.warning(
        "%s is prepared for training, and the ONNX file gets its rounding as arithmetic in float, not as "
        "QuantizeLinear: call convert(model) before torch.onnx.export, or use export_onnx(convert(model), path).",
        type(owner).__name__,
    )


def _warn_of_ranges(owner: CapturedModule) -> None:
    """Say which quantizers are about to round by ranges that nobody has collected, if any."""
    unknown = [path for path, quantizer in quantizers_in_graphs(owner).items() if quantizer.lacks_range()]
    if unknown:
        logger.warning(
            "%s computes with ranges that were never collected (%s): its results say nothing yet. Call "
            "calibrate(model, batches) first.",
            type(owner).__name__,
            listed(unknown),
        )


@contextmanager
def before_calibration(model: nn.Module) -> Iterator[None]:
    """Inside, nobody is warned that ranges are still to be collected: results are not what the calls are made for."""
    told = [
        (child._warned_of, set(child._warned_of)) for child in model.modules() if isinstance(child, CapturedModule)
    ]
    for warned, _ in told:
        warned.add("ranges")
    try:
        yield
    finally:
        for warned, before in told:
            warned.difference_update({"ranges"} - before)


def _mode_name(training: bool) -> str:
    return "training" if training else "evaluation"


def _differs_in_options(captured: CapturedGraph, call: CallSignature) -> bool:
    """Whether a call holds the tensors of the captured one, with other constants."""
    return captured.signature.same_tensors(call) and not captured.signature.same_constants(call)


def _not_captured(name: str, captured: CapturedGraph, call: CallSignature, tensors: Sequence[Tensor]) -> CaptureError:
    different = captured.signature.differences(call)
    if different:
        return CaptureError(
            f"{name} is called with {', '.join(different)} other than in the call that was captured. A prepared "
            "model computes what its example inputs made it compute: prepare it with example_inputs= that contain "
            "this argument, or the labels that it comes of; or do not pass it."
        )
    names = captured.signature.tensor_names()
    for tensor, shape, real, argument in zip(tensors, captured.shapes, captured.real, names, strict=True):
        if real and not tensor.is_floating_point():
            return CaptureError(
                f"{name} was captured for {argument} of real numbers, such as an image processor makes of pixels, and "
                f"got {tensor.dtype}."
            )
        if not fits_shape(tensor, shape):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            advice = "resize the input, or prepare with example_inputs= of that size, or of two by other_size=."
            if fits_shape(tensor[None], shape):
                advice = "the batch comes first: image[None], or images.split(32) for batches of a tensor of images."
            return CaptureError(
                f"{name} was captured for {argument} of shape ({wanted}) and got {tuple(tensor.shape)}: {advice}"
            )
    raise AssertionError("the call is one that was captured")


@cache
def graph_forward(original: Any) -> Callable[..., Any]:
    """A `forward` that runs the graph behind the signature of the class `original`, which others inspect."""

    def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
        return self.run_graph(*args, **kwargs)

    forward.__doc__ = original.forward.__doc__
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    setattr(forward, MADE_BY, (graph_forward, original))
    return forward


def install(module: nn.Module, graphs: list[CapturedGraph], constants: dict[str, Tensor]) -> CapturedModule:
    """Make `module` run `graphs`, in place.

    Args:
        module: the child; its parameters and submodules are what the graphs refer to.
        graphs: the first one is for evaluation.
        constants: tensors that the graphs refer to beside; they become non-persistent buffers.

    Returns:
        The same object, with its class exchanged.
    """
    python_signature = inspect.signature(module.forward)
    original: Any = type(module)
    for name, constant in constants.items():
        module.register_buffer(name, constant, persistent=False)
    forget_own_forward(module)
    captured = swap_class(module, CapturedModule, graph_forward(original))
    for name, value in {
        "graphs": graphs,
        "producer_of_input": {},
        "incoming_quantizer": {},
        "output_quantizers": [],
        "float_operations": [],
        "_python_signature": python_signature,
        "_warned_of": set(),
    }.items():
        # Not nn.Module.__setattr__: none of these is a parameter, a buffer or a submodule.
        object.__setattr__(captured, name, value)
    captured.remember_places()
    return captured


def captured_modules(model: nn.Module) -> dict[str, CapturedModule]:
    """Captured modules in `model`, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, CapturedModule)}
