"""Evaluation computes in float32, as the files do and the device in integers, whatever a model is trained in.

A GPU convolves float32 in TF32 unless it is told not to, with 10 bits of each factor; autocast leaves 7 or 10 of them.
Either moves a sum by more than a step of the codes here and there, and what is measured is then another net.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


#: Where torch keeps what may stand in for float32, per library and operation.
_BACKENDS: Any = torch.backends
_PRECISIONS = (_BACKENDS.cudnn.conv, _BACKENDS.cuda.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.matmul)


@contextmanager
def float32_arithmetic(inputs: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Inside, products of float32 are computed in float32, and autocast is off.

    A compiler takes only the latter: it sees no settings of libraries.

    Args:
        inputs: at least one; on the device that is meant.

    Yields:
        What to compute with: under autocast, the inputs that it has cast down already are float32 again.
    """
    device = inputs[0].device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if cast else nullcontext(), _ieee():
        yield _widened(inputs) if cast else inputs


@contextmanager
def _ieee() -> Iterator[None]:
    found = [] if torch.compiler.is_compiling() else [(p, p.fp32_precision) for p in _PRECISIONS]
    changed = [(precision, value) for precision, value in found if value != "ieee"]
    try:
        for precision, _ in changed:
            precision.fp32_precision = "ieee"
        yield
    finally:
        for precision, value in changed:
            precision.fp32_precision = value


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]
