"""What the kernels of an activation are told of its quantizer, beside the tensors."""

from __future__ import annotations

import math
from typing import NamedTuple


class CodeRange(NamedTuple):
    """What is fixed about a quantizer.

    Attributes:
        qmin, qmax: lowest and highest code.
        logarithmic: its parameters are `log2_scale` and `offset`, in units of the range; else scale and zero point.
        power_of_two: the exponent is rounded.
        scale_limit: upper bound of the scale.
    """

    qmin: int
    qmax: int
    logarithmic: bool = True
    power_of_two: bool = False
    scale_limit: float = math.inf
