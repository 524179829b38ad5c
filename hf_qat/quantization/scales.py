"""From numbers to scales: the scale and zero point of a range, and the scales of a weight.

Affine and symmetric ranges: Jacob et al. 2018, §2.1 and §3; ONNX `QuantizeLinear`. Weight scales of least squared
error: as in Banner et al. 2019 and Nagel et al. 2021 (§3.1), by search.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.spec import QuantizerSpec


#: Lower bound of every scale: `x / scale` stays finite up to |x| = 2**87, and the product of two scales, which is the
#: scale of a bias, stays a normal float32 (2**-80).
SMALLEST_SCALE = 2.0**-40

#: Upper bound of every scale: 16-bit codes times the scale stay finite.
LARGEST_SCALE = 2.0**110

#: What scales must be to be converted, and to be read from a file.
USABLE = "positive, finite, and not denormal"

#: First pass of every clipping search, as fractions of the largest magnitude: 1 down to 1/32.
CLIPPING_FRACTIONS = tuple(2.0 ** (-step / 2) for step in range(11))

#: Second pass, around the best of the first. Measured against 700 fractions on normal, Laplace and Student-t(3)
#: weights in channels of 64 to 200 000 values: at most 1 % more squared error at 2, 3 and 4 bits, where the best
#: fraction lies between 0.02 and 1, and 2 % at 8 bits beyond 1 000 values a channel. Fractions near 1 would do for
#: those channels, but one scale for a whole heavy-tailed tensor clips far below its maximum even at 8 bits.
REFINING_FACTORS = tuple(2.0 ** (step / 16) for step in range(-8, 9))

#: The first and only pass for power-of-two scales, from the one that clips nothing.
POWERS_OF_TWO = tuple(2.0**-step for step in range(7))

#: Share of the magnitudes of each channel that the `"percentile"` scale represents without clipping.
WEIGHT_PERCENTILE = 0.999

#: Weights handled at a time, so that all passes over them stay in cache; by one thread, and by one of several: PyTorch
#: splits no operation on fewer than 2**15 values among its threads (but for `round`, which it splits from 2**11).
BLOCK = 2**16
BLOCK_OF_MANY = 2**15 - 2**8

#: Added and taken away again, it rounds a float32 below 2**22 half to even: the sum has no bits for a fraction.
ROUNDER = 1.5 * 2**23

#: A lower bound so many times as large as an error is above it whatever was rounded on the way.
CERTAINLY_WORSE = 1.01


def scale_from_range(minimum: Tensor, maximum: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point that represent [minimum, maximum].

    The range is widened to contain 0, and an empty one, [0, 0], is taken as [0, 1], which leaves the tensor room to
    become something in training and the biases that use its scale room in int32. Then

        affine:     scale = (maximum - minimum) / (qmax - qmin),  zero_point = clamp(round(qmin - minimum / scale))
        symmetric:  scale = max(minimum / qmin if qmin < 0, maximum / qmax),  zero_point = 0

    A power-of-two scale is rounded up; a fixed scale is kept as it is.

    Args:
        minimum, maximum: () or (C,), finite.
        spec: the quantizer; its `axis` and `observer` play no role here.

    Returns:
        `(scale, zero_point)`, float32, shaped like `minimum`. Scales lie in [SMALLEST_SCALE, LARGEST_SCALE].
    """
    low, high = minimum.float().clamp(max=0.0), maximum.float().clamp(min=0.0)
    high = torch.where(high == low, torch.ones_like(high), high)
    if spec.fixed_scale is not None:
        scale = torch.full_like(low, spec.fixed_scale)
    else:
        scale = _covering_scale(low, high, spec).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        scale = _next_power_of_two(scale) if spec.power_of_two else scale
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, torch.round(spec.qmin - low / scale).clamp(spec.qmin, spec.qmax)


def unusable(scale: Tensor) -> Tensor:
    """Those of the scales, any shape, that are not `USABLE`: (n,)."""
    return scale[~((scale >= torch.finfo(torch.float32).tiny) & (scale < math.inf))].flatten()


def _covering_scale(low: Tensor, high: Tensor, spec: QuantizerSpec) -> Tensor:
    if not spec.symmetric:
        # Halves, because high - low may overflow; exact, because 2 is a power of two.
        return (high / 2 - low / 2) / ((spec.qmax - spec.qmin) / 2)
    scale = high / spec.qmax
    return torch.maximum(scale, low / spec.qmin) if spec.qmin < 0 else scale


def _next_power_of_two(scale: Tensor) -> Tensor:
    """Smallest power of two ≥ `scale`, without the rounding of a logarithm: scale = mantissa * 2**exponent."""
    mantissa, exponent = torch.frexp(scale)  # 0.5 <= mantissa < 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(scale), exponent)


def _scale_of_magnitudes(low: Tensor, high: Tensor, spec: QuantizerSpec) -> Tensor:
    """`scale_from_range`, with rows of zeros given the widest range of all rows."""
    empty = low == high
    low = torch.where(empty, low.min(), low)
    high = torch.where(empty, high.max(), high)
    return scale_from_range(low, high, spec)[0]


def largest_magnitude_scales(rows: Tensor, spec: QuantizerSpec) -> Tensor:
    """The scales, (C,), that represent the largest magnitude of each row of (C, n)."""
    low, high = rows.amin(dim=1), rows.amax(dim=1)  # several times as fast as aminmax along an axis
    return _scale_of_magnitudes(low.clamp(max=0.0), high.clamp(min=0.0), spec)


def percentile_scales(rows: Tensor, spec: QuantizerSpec) -> Tensor:
    """The scales, (C,), that represent all but the largest 0.1 % of the magnitudes of each row of (C, n)."""
    kept = math.ceil(WEIGHT_PERCENTILE * rows.shape[1])
    bound = rows.abs().kthvalue(kept, dim=1).values
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    # A row that is mostly zeros has no percentile to clip at.
    bound = torch.where(bound > 0, bound, torch.maximum(high, -low))
    return _scale_of_magnitudes(low.clamp(max=0.0).maximum(-bound), high.clamp(min=0.0).minimum(bound), spec)


def least_error_scales(rows: Tensor, spec: QuantizerSpec) -> Tensor:
    """The scales, (C,), with which the quantized rows of (C, n) have the least squared error."""
    largest = largest_magnitude_scales(rows, spec)
    if spec.power_of_two:
        return _best_scale(rows, largest, POWERS_OF_TWO, spec)
    first = _best_scale(rows, largest, CLIPPING_FRACTIONS, spec)
    return _best_scale(rows, first, REFINING_FACTORS, spec)


def _best_scale(rows: Tensor, base: Tensor, factors: tuple[float, ...], spec: QuantizerSpec) -> Tensor:
    """Per row, the `base * factor` of least squared error."""
    candidates = torch.outer(base.new_tensor(factors), base).clamp_(SMALLEST_SCALE, LARGEST_SCALE)
    errors = _squared_errors(rows, candidates, factors.index(1.0), spec)
    return candidates.gather(0, errors.argmin(dim=0, keepdim=True)).squeeze(0)


def _squared_errors(rows: Tensor, scales: Tensor, first: int, spec: QuantizerSpec) -> Tensor:
    """Sum of squared errors of `rows`, (C, n), quantized with each of `scales`, (K, C): (K, C).

    On a CPU, bands of rows are worked on side by side, by as many threads as PyTorch has; none of them forks. It is
    infinite there for scales that are known to be worse than the one at `first`.
    """
    if compiles(rows, scales):
        from hf_qat.quantization.kernels.cpu.search import squared_errors

        return squared_errors(rows, scales, first, spec.qmin, spec.qmax, CERTAINLY_WORSE)
    if rows.device.type != "cpu":
        buffer = torch.empty_like(rows)
        return torch.stack([_errors_of_scale(rows, scale, buffer, spec) for scale in scales])
    block = BLOCK if torch.get_num_threads() == 1 else BLOCK_OF_MANY
    height = max(1, block // max(1, rows.shape[1]))
    bands = list(zip(rows.split(height), scales.split(height, dim=1), strict=True))

    def errors_of(band: tuple[Tensor, Tensor]) -> Tensor:
        return _errors_of_band(*band, first, block, spec)

    threads = min(torch.get_num_threads(), len(bands))
    if threads == 1:
        return torch.cat(list(map(errors_of, bands)), dim=1)
    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(errors_of, bands)), dim=1)


def _errors_of_band(rows: Tensor, scales: Tensor, first: int, block: int, spec: QuantizerSpec) -> Tensor:
    """`_squared_errors` of a few rows, `block` values at a time.

    What clipping does to the two extremes of a row alone is a lower bound of its error: at 8 bits, most scales that
    clip at all are above the error of the scale that does not.
    """
    buffer = rows.new_empty(rows.shape[0], min(block, rows.shape[1]))
    errors = torch.full_like(scales, torch.inf)
    errors[first] = _errors_of_scale(rows, scales[first], buffer, spec)
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    clipped = torch.maximum(high - scales * spec.qmax, scales * spec.qmin - low).clamp_(min=0.0).square_()
    hopeful = (clipped <= CERTAINLY_WORSE * errors[first]).any(dim=1).tolist()
    for k, scale in enumerate(scales):
        if hopeful[k] and k != first:
            errors[k] = _errors_of_scale(rows, scale, buffer, spec)
    return errors


def _errors_of_scale(rows: Tensor, scale: Tensor, buffer: Tensor, spec: QuantizerSpec) -> Tensor:
    """Sum of squared errors of each row, quantized with its own of the scales (C,): (C,); a `buffer` at a time."""
    total, steps = torch.zeros_like(scale), scale.unsqueeze(1)
    for values in rows.split(max(1, buffer.shape[1]), dim=1):
        codes = torch.div(values, steps, out=buffer[:, : values.shape[1]]).clamp_(spec.qmin, spec.qmax)
        error = codes.add_(ROUNDER).sub_(ROUNDER).mul_(steps).sub_(values)
        total += error.square_().sum(dim=1)
    return total
