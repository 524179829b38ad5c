"""A number for each value: that of its description, an ATen operation and the numbers of what it was called with."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from hf_qat.graph.capture.aten_calls import Layouts, functional


aten = torch.ops.aten

#: They return the values of their first argument, perhaps in memory of another layout.
COPIES = frozenset({aten.clone, aten.alias, aten.detach, aten.lift_fresh})

#: They return the values of their first argument in the same order, in another shape.
RESHAPES = frozenset({aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze})

#: They take a part of an axis, or put a part of a gradient back into zeros. Where nothing is left out, the result is
#: the first argument: an axis that keeps its length is whole, because steps are positive.
SLICES = frozenset({aten.slice, aten.slice_backward})

#: The order of their two arguments does not matter.
COMMUTATIVE = frozenset({aten.add, aten.mul})


class Numbering:
    """A number for each value, the same in all runs that share this object."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.known: dict[int, Tensor] = {}
        self.reshaped: dict[int, int] = {}
        self.shapes: dict[int, torch.Size] = {}
        self.layouts = Layouts()
        self._terms: dict[int, tuple[int, ...]] = {}
        self._zero: dict[int, bool] = {}

    def of(self, description: Any, shape: torch.Size) -> int:
        """The number of the value with this description."""
        number = self._numbers.setdefault(description, len(self._numbers))
        self.shapes[number] = shape
        return number

    def of_known(self, value: Tensor) -> int:
        """The number of a tensor whose values are known."""
        value = value.detach().contiguous()
        content = blake2b(value.reshape(-1).view(torch.uint8).numpy().data).digest() if value.numel() else b""
        number = self.of(("known", value.dtype, value.shape, content), value.shape)
        self.known.setdefault(number, value)
        return number

    def is_zero(self, number: int | None) -> bool:
        """Whether a value is known to be zero everywhere."""
        if number not in self.known:
            return False
        if number not in self._zero:
            self._zero[number] = not self.known[number].any()
        return self._zero[number]

    def of_reshaped(self, number: int, shape: torch.Size) -> int:
        """The number of a value in another shape."""
        base = self.reshaped.get(number, number)
        if self.shapes[base] == shape:
            return base
        reshaped = self.of(("reshaped", base, shape), shape)
        self.reshaped[reshaped] = base
        return reshaped

    def of_sum(self, numbers: list[Any], shape: torch.Size) -> int:
        """The number of a sum, whose terms autograd may add up in any order."""
        terms = tuple(sorted(term for number in numbers for term in self._terms.get(number, (number,))))
        total = self.of(("sum", *terms), shape)
        self._terms[total] = terms
        return total

    def of_results(
        self, func: Any, flat: list[Any], numbers: list[int | None], results: list[Tensor], draw: int | None
    ) -> list[int]:
        """The numbers of results by operation and arguments.

        Args:
            func: the ATen operation.
            flat: leaves of its arguments.
            numbers: of each leaf, `None` where it is no tensor.
            results: tensors of which only shapes and types count.
            draw: which random draw of the run it is, if any.
        """
        if len(results) == 1 and (known := self._of_the_same(functional(func), flat, numbers, results[0])) is not None:
            return [known]
        packet, described = functional(func), [*map(_plain, flat, numbers)]
        if packet in COMMUTATIVE and len(described) == 2:
            described.sort(key=str)
        name = (str(packet), func._overloadname)
        return [self.of((*name, k, draw, *described), x.shape) for k, x in enumerate(results)]

    def of_written(
        self, func: Any, position: int, flat: list[Any], numbers: list[int | None], shape: torch.Size
    ) -> int:
        """The number of what an operation has written to one of its arguments."""
        return self.of((str(func), position, "written", *map(_plain, flat, numbers)), shape)

    def _of_the_same(self, packet: Any, flat: list[Any], numbers: list[int | None], out: Tensor) -> int | None:
        """The number of a result that is one of the arguments in another place or shape, or a sum in any order."""
        first = next((n for n in numbers if n is not None), None)
        if first is None:
            return None
        same_type = out.dtype == next((x.dtype for x in flat if isinstance(x, Tensor)), None)
        same_shape = out.shape == self.shapes[first]
        if packet in RESHAPES or (packet is aten.expand and same_shape):
            return self.of_reshaped(first, out.shape)
        copies = packet in COPIES or (packet is aten._to_copy and same_type)
        if copies or (packet in SLICES and same_shape) or (packet is aten.constant_pad_nd and not any(flat[1:-1])):
            return first
        if packet is aten.copy and out.shape == self.shapes[numbers[1] or 0] and flat[1].dtype == out.dtype:
            return numbers[1] or 0
        if packet is aten.add and len(flat) == 2 and same_type:  # a third one is the factor of the second
            return self._of_added(flat, numbers, out)
        return None

    def _of_added(self, flat: list[Any], numbers: list[int | None], out: Tensor) -> int | None:
        kept = self._unchanged_sum(flat, numbers, out)
        if kept is None and self._are_alike(flat, numbers, out):
            return self.of_sum(numbers, out.shape)
        return kept

    def _are_alike(self, flat: list[Any], numbers: list[int | None], out: Tensor) -> bool:
        pairs = zip(flat, numbers, strict=True)
        return all(n is not None and x.dtype == out.dtype and self.shapes[n] == out.shape for x, n in pairs)

    def _unchanged_sum(self, flat: list[Any], numbers: list[int | None], out: Tensor) -> int | None:
        """The summand that a sum equals, because the other is zero everywhere."""
        for kept, other in ((0, 1), (1, 0)):
            number, added = numbers[kept], numbers[other]
            if number is None or not self.is_zero(added):
                continue
            if self.shapes[number] == out.shape and flat[kept].dtype == out.dtype:
                return number
        return None


def _plain(value: Any, number: int | None) -> Any:
    """What stands for an argument in a description: of 1, 1.0 and True, each is another."""
    if number is not None:
        return "value", number
    return (type(value).__name__, value if isinstance(value, (int, float, str)) else str(value))
