"""Squared errors of a weight quantized with many scales, to find the best; see `hf_qat.quantization.scales`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_qat.quantization.kernels.cpu.calls import SearchCall
from hf_qat.quantization.kernels.cpu.loops import CHUNK, SEARCH
from hf_qat.quantization.kernels.cpu.threads import run


def squared_errors(
    rows: Tensor, scales: Tensor, first: int, low: float, high: float, certainly_worse: float
) -> Tensor:
    """Sums of squared errors of `rows`, (C, n), quantized with each of `scales`, (K, C): (K, C), float32.

    Args:
        rows, scales: float32.
        first: the scale to compare with: what is certain to be worse gets infinity.
        low, high: lowest and highest code.
        certainly_worse: a lower bound so many times as large as an error is above it, whatever was rounded.
    """
    rows, scales = rows.contiguous(), scales.contiguous()
    errors = torch.empty_like(scales)
    count, length = rows.shape
    together = max(1, CHUNK // max(1, length))
    addresses = rows.data_ptr(), scales.data_ptr(), errors.data_ptr()
    call = SearchCall(0, count, length, len(scales), first, together, *addresses, low, high, certainly_worse)
    run(SEARCH, call, -(-count // together))
    return errors
