"""What the parts of a model receive and return while it runs: recorded, call by call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.graph.call_signature import CallSignature, flatten_call
from hf_qat.graph.capture.modes import shadowed


#: Modules that do no tensor work of their own outside training.
IDLE = (nn.Dropout, nn.Dropout2d, nn.Identity)


@dataclass(frozen=True)
class Search:
    """Which modules of a model are its parts.

    Attributes:
        excluded: says of a path whether it is left alone.
        opened: paths of the modules whose children are parts one by one; `""` is the model.
    """

    excluded: Callable[[str], bool] = lambda path: False
    opened: Collection[str] = ("",)

    def parts(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Children of the opened modules in order, each once; what a bare container holds is its owner's child."""
        seen: set[int] = set()
        for path in sorted(self.opened):
            for name, child in _children(model.get_submodule(path), f"{path}." if path else ""):
                if name not in self.opened and not self.excluded(name) and id(child) not in seen:
                    seen.add(id(child))
                    yield name, child


def _children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child, f"{path}.")
        elif not isinstance(child, IDLE):
            yield path, child


def is_with_loss(output: Any) -> bool:
    """Whether an output of transformers, or a dict, has a single number called `loss`.

    A loss is found by what a part returns, not by names of its arguments: masked image modelling and autoencoders
    compute theirs without any label.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else None
    return isinstance(loss, Tensor) and loss.is_floating_point() and loss.numel() == 1


@dataclass
class CallRecord:
    """What one part received and returned, in order; `inputs` hold the tensors of each call.

    `written` has the positions of outputs that the caller has written to in place, `runs` the ordinal of the run of
    the model that each call belongs to; `has_loss` says whether an output had a loss.
    """

    path: str
    module: nn.Module
    signatures: list[CallSignature] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    has_loss: bool = False
    runs: list[int] = field(default_factory=list)
    _versions: list[list[int]] = field(default_factory=list)

    def add_call(self, signature: CallSignature, tensors: list[Tensor], output: Any, run: int = 0) -> None:
        """Note a call, the tensors in its output, and what was written to them so far."""
        self.runs.append(run)
        self.signatures.append(signature)
        self.inputs.append(tensors)
        self.has_loss |= is_with_loss(output)
        self.outputs.append([leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)])
        self._versions.append([leaf._version for leaf in self.outputs[-1]])

    def extend(self, other: CallRecord, run: int) -> None:
        """Append the record of another run of the same part, the one of the ordinal `run`."""
        self.runs += [run] * len(other.runs)
        self.signatures += other.signatures
        self.inputs += other.inputs
        self.outputs += other.outputs
        self.written |= other.written
        self.has_loss |= other.has_loss

    def compare_versions(self) -> None:
        """Fill `written`, after the run."""
        for outputs, versions in zip(self.outputs, self._versions, strict=True):
            pairs = enumerate(zip(outputs, versions, strict=True))
            self.written |= {k for k, (output, version) in pairs if output._version != version}


#: Path of a part → how it was called.
Records = dict[str, CallRecord]


def record_run(model: nn.Module, search: Search, run: Callable[[], Any]) -> Records:
    """How each part of `model` is called in `run`, in the order of the first call."""
    recorded: Records = {}
    with _recording(list(search.parts(model)), recorded):
        run()
    for calls in recorded.values():
        calls.compare_versions()
    return recorded


def add_run(records: Records, more: Records, run: int) -> None:
    """Append what another run has recorded, the one of the ordinal `run`, in place."""
    for path, calls in more.items():
        records.setdefault(path, CallRecord(path, calls.module)).extend(calls, run)


def _recording(candidates: list[tuple[str, nn.Module]], recorded: Records) -> AbstractContextManager[None]:
    """Shadow `forward` of every candidate, which catches `child(...)` and `child.forward(...)` alike."""
    depth = [0]

    def recorder(path: str, child: nn.Module) -> Callable[..., Any]:
        original = child.forward
        signature = inspect.signature(original)

        def record(*args: Any, **kwargs: Any) -> Any:
            if depth[0]:
                return original(*args, **kwargs)
            call_signature, tensors = flatten_call(signature, args, kwargs)  # the part may write into its arguments
            depth[0] += 1
            try:
                output = original(*args, **kwargs)
            finally:
                depth[0] -= 1
            recorded.setdefault(path, CallRecord(path, child)).add_call(call_signature, tensors, output)
            return output

        record.__signature__ = signature  # type: ignore[attr-defined]
        return record

    return shadowed("forward", {child: recorder(path, child) for path, child in candidates})
