# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What the kernels have in common: IEEE division, rounding half to even, and a quantizer's parameters."""

import triton
import triton.language as tl


#: 1.5 * 2**23: adding it to a float32 below 2**22 leaves no bits for a fraction, so the sum is rounded half to even.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def to_codes(y, low, high):
    """`clamp(round(y), low, high)` for whole bounds: a value between them rounds to one between them.

    NaN stays; a zero has no sign.
    """
    y = tl.where(y < low, low, tl.where(y > high, high, y))
    return (y + ROUNDING) - ROUNDING


@triton.jit
def scale_of(exponent, POWER_OF_TWO: tl.constexpr):
    """2**exponent, the exponent rounded first where scales are powers of two."""
    if POWER_OF_TWO:
        exponent = (exponent + ROUNDING) - ROUNDING
    return tl.exp2(exponent)


@triton.jit
def divide(x, y):
    """The IEEE quotient; `/` may be off by an ulp, and then rounds another value at a tie."""
    return tl.math.div_rn(x, y)
