"""Fake quantization on a CPU as loops that Numba compiles: one pass over a tensor, where PyTorch takes four to seven.

`compiles` says whether they can be used; only then may `activation` and `weight` be imported, which need Numba
(`pip install "hf_qat[cpu]"`). Values are those of PyTorch's operations to the last bit, and so are gradients, but for
those that are sums: these are added up in another order, whatever the number of threads the same in every run. A
folded bias may differ in its last bit.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_qat.quantization.kernels.plain_tensors import is_plain, is_watched


logger = logging.getLogger(__name__)

_INSTALLED = importlib.util.find_spec("numba") is not None


def compiles(*tensors: Tensor) -> bool:
    """Whether the loops can take these tensors: plain ones in float32 on a CPU, and nobody is watching operations."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if not (x.is_cpu and x.dtype is torch.float32 and is_plain(x)):
            return False
    return not is_watched() and _works()


@cache
def _works() -> bool:
    """Whether a first loop runs here; where Numba is installed and does not work, the log says so, once."""
    if not _INSTALLED:
        logger.info('Numba is not installed; with it, fake quantization on a CPU is faster: pip install "hf_qat[cpu]"')
        return False
    try:
        import numba

        from hf_qat.quantization.kernels.cpu.activation import quantize

        quantize(torch.zeros(1, dtype=torch.float32, device="cpu"), 1.0, 0.0, 1.0)
    except Exception as error:  # an old Numba, a processor that it does not know: PyTorch can do without
        logger.warning("Numba does not run here, so fake quantization is slower: %s", error)
        return False
    settings: Any = numba.config  # its names are set as it is imported
    return not settings.DISABLE_JIT
