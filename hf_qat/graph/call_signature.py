"""A call of a module with its tensors taken out: what two calls of one module have in common, and what differs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


#: What the Trainer sends along for the loss alone: task models hand it on to their children among their `**kwargs`.
LOSS_ARGUMENTS = frozenset({"num_items_in_batch"})


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
        defaults: name of an argument that was not passed → its default.
    """

    positional: tuple[str, ...]
    specs: dict[str, Any]
    leaves: dict[str, list[Leaf]]
    defaults: dict[str, Any] = field(default_factory=dict)

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
        """Names of arguments in which `other` differs; one that is absent has its default.

        The default of what would be among the `**kwargs` is not known here: absent is as `None`, and as `False` of the
        flags of transformers. `None` and `False` count as the same where they are passed: models take both for
        "as the configuration says".
        """
        names = self.leaves.keys() | other.leaves.keys()
        return sorted(name for name in names if not self._agrees(other, name))

    def _agrees(self, other: CallSignature, name: str) -> bool:
        is_known = all(name in call.leaves or name in call.defaults for call in (self, other))
        off_is_none = is_known or name.startswith("output_")
        mine, theirs = self._leaves_of(name), other._leaves_of(name)
        return len(mine) == len(theirs) and all(
            _same_leaf(a, b, off_is_none) for a, b in zip(mine, theirs, strict=True)
        )

    def _leaves_of(self, name: str) -> list[Leaf]:
        return self.leaves[name] if name in self.leaves else _leaves(self.defaults.get(name))


def _leaves(value: Any) -> list[Leaf]:
    return [leaf_of(leaf) for leaf in pytree.tree_leaves(value)]


def _same_leaf(mine: Leaf, theirs: Leaf, off_is_none: bool) -> bool:
    if not isinstance(mine, Constant) or not isinstance(theirs, Constant):
        return mine is theirs
    a, b = mine.value, theirs.value
    return bool(a is b or a == b or (off_is_none and _is_off(a) and _is_off(b)))


def _is_off(value: Any) -> bool:
    return value is None or value is False


def flatten_call(
    signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[CallSignature, list[Tensor]]:
    """Take the tensors out of a call."""
    bound = signature.bind(*args, **kwargs)
    kinds = {name: signature.parameters[name].kind for name in bound.arguments}
    # Arguments before a *args must stay positional, the others are clearer by name.
    by_name: set[object] = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    if inspect.Parameter.VAR_POSITIONAL not in kinds.values():
        by_name.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    values: dict[str, Any] = {}
    positional: list[str] = []
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            found = {key: item for key, item in value.items() if key not in LOSS_ARGUMENTS}
        elif kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            found = {f"{name}_{k}": item for k, item in enumerate(value)}
        else:
            found = {name: value}
        values.update(found)
        positional += () if kinds[name] in by_name else found
    specs, leaves, tensors = {}, {}, []
    for name, value in values.items():
        flat, specs[name] = pytree.tree_flatten(value)
        tensors += [leaf for leaf in flat if isinstance(leaf, Tensor)]
        leaves[name] = [leaf_of(leaf) for leaf in flat]
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in values and parameter.default is not inspect.Parameter.empty
    }
    return CallSignature(tuple(positional), specs, leaves, defaults), tensors
