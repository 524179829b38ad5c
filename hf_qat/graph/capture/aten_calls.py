"""Calls of ATen operations as a dispatch mode sees them: arguments, what they write to, how results lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_qat.graph.capture.meta_device import META


aten = torch.ops.aten

#: It writes to the running statistics, its arguments 3 and 4, though its schema does not say so.
BATCH_NORM = aten.native_batch_norm.default


class Layouts:
    """Runs operations on the meta device; what a layer does to layouts is found out once for all layers like it."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}

    def run(self, func: Any, flat: list[Any], spec: ArgumentSpec) -> Any:
        """The result of `func` on arguments that were flattened into `flat`, as tensors without values."""
        if functional(func) is not func.overloadpacket:
            return flat[0]
        key = (func, spec, *map(_layout, flat)) if _makes_memory(func) else None
        if key is not None and key in self._results:
            known = self._results[key]
            return _empty(known) if isinstance(known, _Layout) else tuple(map(_empty, known))
        here = [x.to(META) if isinstance(x, Tensor) and x.device != META else x for x in flat]
        args, kwargs = spec.unflatten(here)
        result = func(*args, **kwargs)
        if key is not None:
            self._results[key] = tuple(map(_layout, result)) if isinstance(result, (tuple, list)) else _layout(result)
        return result


class _Layout(NamedTuple):
    """Of a tensor in memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _layout(value: Any) -> Any:
    """What the layout of a result depends on in an argument."""
    if isinstance(value, Tensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    return type(value), str(value)


def _empty(layout: Any) -> Any:
    """A tensor without values; what is no layout of one stands for `None`."""
    if not isinstance(layout, _Layout):
        return None
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=META)


class ArgumentSpec(NamedTuple):
    """How the arguments of an operation were, before they were flattened: one list in another at most."""

    positional: int
    keys: tuple[str, ...]
    lengths: tuple[int | None, ...]

    def unflatten(self, flat: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """`(args, kwargs)` of leaves."""
        leaves = iter(flat)
        values = [next(leaves) if n is None else list(islice(leaves, n)) for n in self.lengths]
        return values[: self.positional], dict(zip(self.keys, values[self.positional :], strict=True))


def flatten_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], ArgumentSpec]:
    """Leaves of the arguments of an operation."""
    flat: list[Any] = []
    lengths: list[int | None] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            flat += value
            lengths.append(len(value))
        else:
            flat.append(value)
            lengths.append(None)
    return flat, ArgumentSpec(len(args), tuple(kwargs), tuple(lengths))


def tensors_in(values: Any) -> list[Tensor]:
    """Those among what an operation returned, or in one argument of it."""
    return [x for x in (values if isinstance(values, (tuple, list)) else (values,)) if isinstance(x, Tensor)]


@cache
def _makes_memory(func: Any) -> bool:
    return not any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns))


@cache
def functional(func: Any) -> Any:
    """The operation that returns what an in-place one writes; a functional one itself."""
    name = func._schema.name.split("::")[1]
    if func._schema.is_mutable and name.endswith("_"):
        return getattr(aten, name[:-1], func.overloadpacket)
    return func.overloadpacket


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments that the operation writes to."""
    if func is BATCH_NORM:
        return tensors_in(args[3:5]) if args[5] else []
    places = written_places(func)
    return [x for k, name in places for x in tensors_in(args[k] if k < len(args) else kwargs.get(name))]


@cache
def written_places(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that the schema says are written to."""
    arguments = enumerate(func._schema.arguments)
    return [(k, x.name) for k, x in arguments if x.alias_info is not None and x.alias_info.is_write]
