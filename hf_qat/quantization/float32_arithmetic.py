"""Evaluation computes in float32, as the files do and the device in integers, whatever a model is trained in.

A GPU convolves float32 in TF32 unless it is told not to, with 10 bits of each factor; autocast leaves 7 or 10 of them.
Either moves a sum by more than a step of the codes here and there, and what is measured is then another net.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


_BACKENDS: Any = torch.backends

#: What may stand in for float32; all else is float32 itself.
REDUCED = ("tf32", "bf16")


@dataclass
class _Settings:
    """What a library is told of float32. Threads share it, so the last of those that evaluate puts it back.

    Attributes:
        precisions: where torch keeps it, per operation.
        changed: what was changed, and its value before.
        inside: calls that compute in float32 now.
    """

    precisions: tuple[Any, ...]
    changed: list[tuple[Any, str]] = field(default_factory=list)
    inside: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def ieee(self) -> Iterator[None]:
        """Inside, float32 is float32."""
        with self.lock:
            self.inside += 1
            for precision in self.precisions:
                if precision.fp32_precision in REDUCED:
                    self.changed.append((precision, precision.fp32_precision))
                    precision.fp32_precision = "ieee"
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                while self.changed and not self.inside:
                    precision, value = self.changed.pop()
                    precision.fp32_precision = value


#: By the kind of device. Of another device's nothing is changed: torch raises an error where a thread asks for TF32 in
#: general while it is off for convolutions alone, as its exporter does.
_SETTINGS = {
    "cpu": _Settings((_BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.matmul)),
    "cuda": _Settings((_BACKENDS.cudnn.conv, _BACKENDS.cuda.matmul)),
}


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
    with torch.autocast(device, enabled=False) if cast else nullcontext(), _ieee(device):
        yield _widened(inputs) if cast else inputs


def _ieee(device: str) -> AbstractContextManager[None]:
    settings = None if torch.compiler.is_compiling() else _SETTINGS.get(device)
    return nullcontext() if settings is None else settings.ieee()


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]
