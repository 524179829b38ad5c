"""The full description of one quantizer: what `graph/place.py` decides and `FakeQuantize` carries out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizerSpec:
    """Codes are integers in [`qmin`, `qmax`]; a code `q` stands for the real number `(q - zero_point) * scale`.

    Attributes:
        bits: width of the codes, 2 to 8, or 16.
        signed: two's complement codes, otherwise unsigned.
        symmetric: `zero_point` is 0 for good.
        non_negative: the tensor is known to be ≥ 0, so `qmin` is 0 even if `signed`.
        narrow_range: drop the lowest code (−128), so that the range is symmetric: weights.
        axis: channel axis for one scale per channel, `None` for one scale.
        power_of_two: scales are powers of two.
        learned: scale (and offset, unless `symmetric`) are parameters.
        observer: name in the registry of `quantization/observers`.
        fixed_scale: the scale is known beforehand (softmax, sigmoid: 1/256) and never changes.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    non_negative: bool = False
    narrow_range: bool = False
    axis: int | None = None
    power_of_two: bool = False
    learned: bool = False
    observer: str = "mse"
    fixed_scale: float | None = None

    @property
    def qmin(self) -> int:
        """Lowest code."""
        if not self.signed or (self.non_negative and self.symmetric):
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.bits - int(self.signed))) - 1
