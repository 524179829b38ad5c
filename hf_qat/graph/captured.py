"""The captured module: the child itself, its class exchanged for one that runs an FX graph behind the same signature.

Parameters, buffers, submodules and attributes stay where they were, so state-dict keys, `config`, `isinstance` and
whatever outer code reads of the child go on working.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CaptureError
from hf_qat.quantization.class_swap import swap_class


#: What the Trainer sends along for the loss alone: task models hand it on to their children among their `**kwargs`.
LOSS_ARGUMENTS = frozenset({"num_items_in_batch"})


@dataclass(frozen=True)
class CallSignature:
    """A call with its tensors taken out: for each argument by name, its structure and its constants.

    Attributes:
        positional: names of the arguments that are passed by position (a forward with `*args` has `args_0`, …).
        specs: argument name → tree of its value.
        leaves: argument name → for each leaf `None` (a tensor) or a 1-tuple with the constant.
    """

    positional: tuple[str, ...]
    specs: dict[str, Any]
    leaves: dict[str, list[Any]]

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The `(args, kwargs)` of the call around new tensors."""
        remaining = iter(tensors)
        values = {
            name: pytree.tree_unflatten(
                [next(remaining) if leaf is None else leaf[0] for leaf in self.leaves[name]], spec
            )
            for name, spec in self.specs.items()
        }
        args = [values.pop(name) for name in self.positional]
        return args, values

    def tensor_names(self) -> list[str]:
        """A name per tensor: the argument's, with an ordinal where an argument holds several."""
        names = []
        for name, leaves in self.leaves.items():
            count = sum(leaf is None for leaf in leaves)
            names += [name] if count == 1 else [f"{name}_{k}" for k in range(count)]
        return names

    def same_constants(self, other: CallSignature) -> bool:
        """Whether the two calls differ in nothing but the tensors."""
        return not self.differences(other)

    def differences(self, other: CallSignature) -> list[str]:
        """Names of arguments in which `other` differs; absent, `None` and `False` count as the same."""
        different = []
        for name in self.leaves.keys() | other.leaves.keys():
            mine, theirs = self.leaves.get(name), other.leaves.get(name)
            if mine is None or theirs is None:
                present = mine if theirs is None else theirs
                if any(leaf is None or leaf[0] not in (None, False) for leaf in present or []):
                    different.append(name)
            elif not _same_leaves(mine, theirs):
                different.append(name)
        return sorted(different)


def _same_leaves(mine: list[Any], theirs: list[Any]) -> bool:
    if len(mine) != len(theirs):
        return False
    for a, b in zip(mine, theirs, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and not (a[0] is b[0] or a[0] == b[0] or (not a[0] and not b[0])):
            return False
    return True


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
        leaves[name] = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in flat]
    return CallSignature(tuple(positional), specs, leaves), tensors


class CapturedModule(nn.Module):
    """Mixed into the class of a captured child by `install`; see there for the attributes."""

    graph: fx.Graph
    signature: CallSignature
    shapes: list[tuple[int | None, ...]]
    output_spec: Any
    output_constants: list[Any]
    producer_of_input: dict[int, tuple[str, int]]
    incoming_quantizer: dict[int, tuple[str, str]]
    output_quantizers: list[str | None]
    float_operations: list[tuple[str, str, str]]
    _run: Callable[..., Any]
    _python_signature: inspect.Signature

    def recompile(self) -> None:
        """Generate the Python function of `graph` anew, after a pass has changed the graph."""
        self.graph.lint()
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<graph of {type(self).__name__}>", "exec"), namespace)  # noqa: S102
        object.__setattr__(self, "_run", namespace["forward"])

    def run_graph(self, *args: Any, **kwargs: Any) -> Any:
        """Take the tensors out of the call, run the graph, and rebuild the result of the original forward."""
        call, tensors = flatten_call(self._python_signature, args, kwargs)
        self._check(call, tensors)
        outputs = iter(self._run(self, *tensors))
        leaves = [next(outputs) if constant is None else constant[0] for constant in self.output_constants]
        return pytree.tree_unflatten(leaves, self.output_spec)

    def _check(self, call: CallSignature, tensors: Sequence[Tensor]) -> None:
        name = type(self).__name__
        different = self.signature.differences(call)
        if different:
            raise CaptureError(
                f"{name} is called with {', '.join(different)} other than in the call that was captured. A prepared "
                "model computes what its example inputs made it compute: prepare it with example_inputs= that contain "
                "this argument, or do not pass it."
            )
        for tensor, shape, argument in zip(tensors, self.shapes, self.signature.tensor_names(), strict=True):
            fits = tensor.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
            if not fits:
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise CaptureError(
                    f"{name} was captured for {argument} of shape ({wanted}) and got {tuple(tensor.shape)}: resize "
                    "the input, or prepare the model with example_inputs= of that size."
                )


def _graph_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """A `forward` that runs the graph behind the original's signature, which Trainer and backbones inspect."""

    def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
        return self.run_graph(*args, **kwargs)

    forward.__doc__ = original.forward.__doc__
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    return forward


def install(
    module: nn.Module,
    graph: fx.Graph,
    signature: CallSignature,
    shapes: list[tuple[int | None, ...]],
    output_spec: Any,
    output_constants: list[Any],
) -> CapturedModule:
    """Make `module` run `graph`, in place.

    Args:
        module: the child; its parameters and submodules are what `graph` refers to.
        graph: flat tensors in, a tuple of flat tensors out.
        signature: the call that was captured.
        shapes: per input the captured sizes, `None` where any size goes.
        output_spec, output_constants: its tree, and per leaf `None` (a tensor) or a 1-tuple with the constant.

    Returns:
        The same object, with its class exchanged.
    """
    python_signature = inspect.signature(module.forward)
    captured = swap_class(module, CapturedModule, _graph_forward(type(module)))
    for name, value in {
        "graph": graph,
        "signature": signature,
        "shapes": shapes,
        "output_spec": output_spec,
        "output_constants": output_constants,
        "producer_of_input": {},
        "incoming_quantizer": {},
        "output_quantizers": [],
        "float_operations": [],
        "_python_signature": python_signature,
    }.items():
        # Not nn.Module.__setattr__: none of these is a parameter, a buffer or a submodule.
        object.__setattr__(captured, name, value)
    captured.recompile()
    return captured


def captured_modules(model: nn.Module) -> dict[str, CapturedModule]:
    """Captured modules in `model`, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, CapturedModule)}
