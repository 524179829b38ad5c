"""Fake quantization as Triton kernels: what is several passes over a tensor, or many launches, is one of each here.

`fuses` says whether they can be used; only then may `activation` and `weight` be imported, which need Triton.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from hf_qat.quantization.kernels.plain_tensors import is_plain, is_watched


logger = logging.getLogger(__name__)


def fuses(x: Tensor) -> bool:
    """Whether the kernels can take `x`: a plain one on a GPU that Triton knows, and nobody is watching operations."""
    if torch.compiler.is_compiling() or not (x.is_cuda or _INTERPRETED):
        return False
    return is_plain(x) and not is_watched() and _works(x.device)


def calls_operators(x: Tensor) -> bool:
    """Whether a compiler is tracing that can be given the kernels as operators (its own code is Triton's, too)."""
    return (x.is_cuda and _INSTALLED or _INTERPRETED) and torch.compiler.is_compiling()


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python (`TRITON_INTERPRET=1`), which it can do on a CPU, too."""
    if not _INSTALLED:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


_INSTALLED = importlib.util.find_spec("triton") is not None

_INTERPRETED = _interpreted()


@cache
def _works(device: torch.device) -> bool:
    """Whether a first kernel runs on `device`; if not, the log says so, once."""
    try:
        from hf_qat.quantization.kernels.activation import quantize
        from hf_qat.quantization.kernels.code_range import CodeRange

        x = torch.zeros(1, dtype=torch.float32, device=device)
        quantize(x, x[0], None, CodeRange(0, 1))
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know: torch can do without
        logger.warning("Triton does not run on %s, so fake quantization is slower there: %s", device, error)
        return False
    return True
