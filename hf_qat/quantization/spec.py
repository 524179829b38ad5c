"""The full description of one quantizer: what `graph/passes` decides and `FakeQuantize` carries out."""

from __future__ import annotations

from dataclasses import dataclass, field


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
        qmin, qmax: lowest and highest code, which follow from the others.
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
    qmin: int = field(init=False, repr=False, compare=False)
    qmax: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the ends of the codes once: every quantizer asks for them in every step."""
        from_zero = not self.signed or (self.non_negative and self.symmetric)
        lowest = 0 if from_zero else int(self.narrow_range) - (1 << (self.bits - 1))
        object.__setattr__(self, "qmin", lowest)
        object.__setattr__(self, "qmax", (1 << (self.bits - int(self.signed))) - 1)
