"""Batch sizes at which a graph of `torch.export` may be another than the module: those at which a guard fails.

The exporter follows one branch of `if x.shape[0] > 10`, and writes down for which sizes it is the right one. It
writes down much that changes nothing, too (a reshape asks whether sizes divide), so a size is named here, and tried
out by the proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


#: Batch sizes that are looked at, and how many of them are named at most.
SIZES, MOST = (*range(2, 65), 128, 256, 512, 1024), 4

#: Inputs of so many values take long to compute with, and are left out.
LARGEST = 2**24

#: The name of the inputs in the arguments of the exported wrapper.
INPUTS = "tensors"


class _Shape:
    """Answers what a guard asks of a tensor."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes

    def size(self) -> tuple[int, ...]:
        return self._sizes


def doubtful_sizes(guards: Sequence[str], first: Sequence[Tensor], last: Sequence[Tensor]) -> tuple[int, ...]:
    """The smallest batch sizes from 2 at which a guard fails, a few at most.

    Args:
        guards: Python expressions, such as `L['tensors'][0].size()[0] <= 10`.
        first, last: the inputs at batch sizes of 2 and 3.
    """
    found = {size for guard in guards for size in _first_failure(guard, first, last)}
    return tuple(sorted(found)[:MOST])


def _first_failure(guard: str, first: Sequence[Tensor], last: Sequence[Tensor]) -> Iterator[int]:
    for size in SIZES:
        shapes = [shape_at(size, x, y) for x, y in zip(first, last, strict=True)]
        if sum(map(math.prod, shapes)) > LARGEST:
            return
        inputs = {INPUTS: [_Shape(shape) for shape in shapes]}
        if not _holds(guard, {"L": inputs, "math": math}):
            yield size
            return


def shape_at(size: int, first: Tensor, last: Tensor) -> tuple[int, ...]:
    """The shape of an input at a batch of `size`, of which two are given, at 2 and 3."""
    return tuple(max(1, n + (m - n) * (size - 2)) for n, m in zip(first.shape, last.shape, strict=True))


def _holds(guard: str, names: dict[str, Any]) -> bool:
    try:
        return bool(eval(guard, names))
    except Exception:  # it asks for more than sizes
        return True
