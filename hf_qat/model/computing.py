"""Let layers compute in another way for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from hf_qat.quantization.layers import QATLayer


Compute = Callable[..., Tensor]


@contextmanager
def computing_by(layers: Iterable[QATLayer], change: Callable[[QATLayer, Compute], Compute]) -> Iterator[None]:
    """Inside, each layer's `compute` is `change(layer, its own compute)`."""
    shadowed = list(layers)
    for layer in shadowed:
        object.__setattr__(layer, "compute", change(layer, layer.compute))
    try:
        yield
    finally:
        for layer in shadowed:
            object.__delattr__(layer, "compute")
