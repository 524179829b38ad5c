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
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError, StageError, listed
from hf_qat.graph.generated_code import function_of
from hf_qat.graph.leading_axes import takes_leading_axes
from hf_qat.graph.nodes import is_floating, short_name
from hf_qat.graph.stored_graph import restore_graph, store_graph
from hf_qat.quantization.class_swap import MADE_BY, swap_class
from hf_qat.quantization.layers import QATLayer, qat_layers
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from hf_qat.quantization.saved_codes import codes_for_backward


logger = logging.getLogger(__name__)

#: What the Trainer sends along for the loss alone: task models hand it on to their children among their `**kwargs`.
LOSS_ARGUMENTS = frozenset({"num_items_in_batch"})


#: Modules in a graph that look at their own mode.
FOLLOW_THEIR_MODE = (nn.modules.batchnorm._BatchNorm, QATLayer, FakeQuantize)

#: Key in the `meta` of an input: the name of the argument that it comes from.
ARGUMENT = "argument"


class Slot(Enum):
    """The place of a tensor among the leaves of a nested structure."""

    TENSOR = "tensor"


@dataclass(frozen=True)
class Constant:
    """A leaf of a nested structure that is no tensor."""

    value: Any


Leaf = Slot | Constant


def leaf_of(value: Any) -> Leaf:
    """What is kept of a leaf once the tensors are taken out."""
    return Slot.TENSOR if isinstance(value, Tensor) else Constant(value)


def fill(leaves: Sequence[Leaf], tensors: Any) -> list[Any]:
    """The leaves, with the next of the iterator `tensors` in every slot."""
    return [leaf.value if isinstance(leaf, Constant) else next(tensors) for leaf in leaves]


@dataclass(frozen=True)
class CallSignature:
    """A call with its tensors taken out: for each argument by name, its structure and its constants.

    Attributes:
        positional: names of the arguments that are passed by position (a forward with `*args` has `args_0`, …).
        specs: argument name → tree of its value.
        leaves: argument name → the leaves of its value.
    """

    positional: tuple[str, ...]
    specs: dict[str, Any]
    leaves: dict[str, list[Leaf]]

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The `(args, kwargs)` of the call around new tensors."""
        remaining = iter(tensors)
        values = {
            name: pytree.tree_unflatten(fill(self.leaves[name], remaining), spec) for name, spec in self.specs.items()
        }
        args = [values.pop(name) for name in self.positional]
        return args, values

    def tensor_names(self) -> list[str]:
        """A name per tensor: the argument's, with an ordinal where an argument holds several."""
        names = []
        for name, leaves in self.leaves.items():
            count = leaves.count(Slot.TENSOR)
            names += [name] if count == 1 else [f"{name}_{k}" for k in range(count)]
        return names

    def same_constants(self, other: CallSignature) -> bool:
        """Whether the two calls differ in nothing but the tensors."""
        return not self.differences(other)

    def same_tensors(self, other: CallSignature) -> bool:
        """Whether the same arguments hold tensors, and as many: what differs are options, such as flags."""
        return self._tensor_counts() == other._tensor_counts()

    def _tensor_counts(self) -> dict[str, int]:
        counts = {name: leaves.count(Slot.TENSOR) for name, leaves in self.leaves.items()}
        return {name: count for name, count in counts.items() if count}

    def differences(self, other: CallSignature) -> list[str]:
        """Names of arguments in which `other` differs; absent, `None` and `False` count as the same."""
        different = []
        for name in self.leaves.keys() | other.leaves.keys():
            mine, theirs = self.leaves.get(name), other.leaves.get(name)
            if mine is None or theirs is None:
                present = mine or theirs or []
                if any(not isinstance(leaf, Constant) or leaf.value not in (None, False) for leaf in present):
                    different.append(name)
            elif len(mine) != len(theirs) or not all(map(_same_leaf, mine, theirs)):
                different.append(name)
        return sorted(different)


def _same_leaf(mine: Leaf, theirs: Leaf) -> bool:
    if not isinstance(mine, Constant) or not isinstance(theirs, Constant):
        return mine is theirs
    a, b = mine.value, theirs.value
    return bool(a is b or a == b or (not a and not b))


def flatten_call(
    signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[CallSignature, list[Tensor]]:
    """Take the tensors out of a call."""
    bound = signature.bind(*args, **kwargs)
    values: dict[str, Any] = {}
    positional: list[str] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            values.update({key: item for key, item in value.items() if key not in LOSS_ARGUMENTS})
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            for k, item in enumerate(value):
                values[f"{name}_{k}"] = item
                positional.append(f"{name}_{k}")
        else:
            values[name] = value
            # Arguments before a *args must stay positional, the others are clearer by name.
            if kind is inspect.Parameter.POSITIONAL_ONLY or "args" in bound.arguments:
                positional.append(name)
    specs, leaves, tensors = {}, {}, []
    for name, value in values.items():
        flat, specs[name] = pytree.tree_flatten(value)
        tensors += [leaf for leaf in flat if isinstance(leaf, Tensor)]
        leaves[name] = [leaf_of(leaf) for leaf in flat]
    return CallSignature(tuple(positional), specs, leaves), tensors


@dataclass
class CapturedGraph:
    """A graph for one way to call a module.

    Attributes:
        graph: flat tensors in, a tuple of flat tensors out; its names are relative to the module.
        signature: the call that was captured.
        shapes: per input the captured sizes, `None` where any size goes.
        real: per input whether it is of real numbers.
        result_spec, result_leaves: structure of what the module returns.
        training: the mode of the module.
        frozen: paths of the modules inside that were in the other mode.
        doubtful_sizes: batch sizes at which the exporter itself does not vouch for it.
        labelled_calls: `(args, kwargs)` that only a labelled step calls it with, of tensors without values: the first,
            and one of other sizes; empty where calls without labels are like it.
        run: the Python function of `graph`, called with the module and the inputs.
    """

    graph: fx.Graph
    signature: CallSignature
    shapes: list[tuple[int | None, ...]]
    result_spec: Any
    result_leaves: list[Leaf]
    training: bool
    frozen: frozenset[str] = frozenset()
    doubtful_sizes: tuple[int, ...] = ()
    labelled_calls: list[tuple[list[Any], dict[str, Any]]] = field(default_factory=list)
    real: list[bool] = field(init=False)
    run: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for node, name in zip(self.inputs(), self.signature.tensor_names(), strict=True):
            node.meta[ARGUMENT] = name
        self.real = list(map(is_floating, self.inputs()))
        self.recompile()

    def recompile(self) -> None:
        """Generate `run` anew, after a pass has changed the graph."""
        self.run = function_of(self.graph)

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` and `copy` keep: plain data, without the function that `recompile` makes."""
        return {**vars(self), "graph": store_graph(self.graph), "run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the graph and its function again."""
        vars(self).update(state, graph=restore_graph(state["graph"]))
        self.__post_init__()

    def inputs(self) -> list[fx.Node]:
        """The nodes of the inputs, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the shapes are among those that were captured."""
        return len(tensors) == len(self.shapes) and all(map(_fits, tensors, self.shapes))

    def takes(self, module: nn.Module, call: CallSignature, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph computes what `module` does in this call."""
        if not self.signature.same_constants(call) or len(tensors) != len(self.shapes):
            return False
        if any(real and not tensor.is_floating_point() for tensor, real in zip(tensors, self.real, strict=True)):
            return False
        if self.fits(tensors):
            return True
        return all(map(_ends_alike, tensors, self.shapes)) and takes_leading_axes(module, self.graph)

    def compute(self, module: object, tensors: Sequence[Tensor]) -> Any:
        """Run on flat tensors; the result has the structure of the original forward's."""
        outputs = iter(self.run(module, *tensors))
        return pytree.tree_unflatten(fill(self.result_leaves, outputs), self.result_spec)


class CaptureCall(Protocol):
    """Captures a call of a prepared model's part that was not seen when the model was prepared."""

    def __call__(self, module: CapturedModule, call: CallSignature, tensors: Sequence[Tensor]) -> CapturedGraph:
        """A graph of the call, over the modules and quantizers that `module` has; `CaptureError` if there is none."""


class Place(NamedTuple):
    """Where a module is registered: below a captured module at `path`, and directly in `parent` under `name`."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    follows_its_mode: bool

    def is_intact(self) -> bool:
        """Whether it is still there."""
        return self.parent._modules.get(self.name) is self.module


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    sizes = zip(shape, tensor.shape, strict=True) if tensor.dim() == len(shape) else [(-1, -2)]
    return all(n is None or isinstance(m, torch.SymInt) or n == m for n, m in sizes)  # a symbol: PyTorch is exporting


def _ends_alike(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether the last axis is as captured; there is one beside it."""
    return tensor.dim() > 1 and len(shape) > 1 and tensor.shape[-1] == shape[-1]


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
        call, tensors = flatten_call(self._python_signature, args, kwargs)
        captured = self._graph_for(call, tensors)
        if torch.compiler.is_compiling():
            return captured.compute(self, tensors)
        self._check_places(captured)
        with codes_for_backward(self.saves_memory):
            return captured.compute(self, tensors)

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
                places.append(Place(path, self.get_submodule(owner), name, module, follows))
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
            path, parent, name, module, follows_its_mode = place
            if parent._modules.get(name) is not module:
                raise _exchanged(self, place)
            if follows_its_mode:
                if "ranges" not in warned and _rounds(module):
                    warned.add("ranges")
                    _warn_of_ranges(self)
            elif (module.training is training) is (path in frozen) and "modes" not in warned:
                warned.add("modes")
                _warn_of_mode(self, place)
            before, after = module._forward_pre_hooks or module._backward_pre_hooks, module._forward_hooks
            if (before or after or module._backward_hooks) and "hooks" not in warned and user_hooks(module):
                warned.add("hooks")
                _warn_of_hook(self, place)


def _exchanged(owner: CapturedModule, place: Place) -> StageError:
    return StageError(
        f"{place.path} of {type(owner).__name__} was exchanged or removed after prepare_qat: the graph, the "
        "quantizers and the optimizer know the one from before. Change the float model, then prepare it."
    )


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


def _rounds(module: nn.Module) -> bool:
    """Whether it is a quantizer that rounds by its range, instead of collecting one."""
    return isinstance(module, FakeQuantize) and module.rounds and module.observer is None


def _warn_of_ranges(owner: CapturedModule) -> None:
    """Say which quantizers are about to round by ranges that nobody has collected, if any."""
    weights = {id(layer.weight_quantizer) for layer in qat_layers(owner).values()}  # need no data
    unknown = [path for path, q in fake_quantizers(owner).items() if id(q) not in weights and q.lacks_range()]
    if unknown:
        logger.warning(
            "%s computes with ranges that were never collected (%s): its results say nothing yet. Call "
            "calibrate(model, batches) first.",
            type(owner).__name__,
            listed(unknown),
        )


def _mode_name(training: bool) -> str:
    return "training" if training else "evaluation"


def user_hooks(module: nn.Module) -> list[object]:
    """The hooks on a module, other than those of torch and transformers, whose work a graph contains.

    Weight norm, spectral norm and pruning compute weights in hooks; transformers collects hidden states by them. Ours
    are on what a graph calls, and are gone after a pass.
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
    return not _origin(hook).startswith(("torch.nn.utils.", "transformers.", "hf_qat."))


def _origin(hook: object) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


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
        if not _fits(tensor, shape):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            return CaptureError(
                f"{name} was captured for {argument} of shape ({wanted}) and got {tuple(tensor.shape)}: resize "
                "the input, or prepare the model with example_inputs= of that size."
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
