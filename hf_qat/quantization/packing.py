"""Integer storage: dtypes of codes, and two codes of four bits in a byte."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_qat.quantization.spec import QuantizerSpec


def code_dtype(spec: QuantizerSpec) -> torch.dtype:
    """The smallest stock dtype that holds the codes: fewer than 8 bits live in 8."""
    if spec.bits <= 8:
        return torch.int8 if spec.signed else torch.uint8
    return torch.int16 if spec.signed else torch.uint16


def pack_nibbles(codes: Tensor) -> Tensor:
    """(n,) codes of at most 4 bits → (ceil(n / 2),) uint8, the earlier code in the lower half of each byte."""
    nibbles = (codes.to(torch.int16) & 15).to(torch.uint8)
    low, high = nibbles[::2], nibbles[1::2]
    return low | nn.functional.pad(high, (0, low.numel() - high.numel())) << 4


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_nibbles` for signed codes: (ceil(count / 2),) uint8 → (count,) int8."""
    halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count].to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)
