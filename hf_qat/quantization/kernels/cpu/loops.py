# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The loops, compiled for the processor at hand.

All of PyTorch's threads call a loop at the same time with the same call. A thread takes the first chunk that none has
taken, until there are no more: one that is held up, by another process for instance, holds up nobody else.

The loops and what they use stand in one file, since what Numba has compiled is kept on disk until this file changes.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from hf_qat.quantization.kernels.cpu.calls import (
    Call,
    CompactBackwardCall,
    CompactCall,
    ExpandCall,
    FoldBackwardCall,
    FoldCall,
    QuantizeBackwardCall,
    QuantizeCall,
    SearchCall,
)
from hf_qat.quantization.kernels.folding import SMALLEST_FACTOR as SMALLEST


#: Values that a thread works on before it looks for more; they and what comes out fit into its cache.
CHUNK = 2**14


SMALLEST_FACTOR = np.float32(SMALLEST)

#: log2 to natural logarithm.
LN2 = np.float32(math.log(2.0))


def chunks_of(count: int) -> int:
    """How many hold `count` values."""
    return -(-count // CHUNK)


def _pointer_to(kind: Any) -> Callable[..., Any]:
    """The address of values of a kind as a pointer."""

    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


def _number(typing_context: Any, call: Any) -> Any:
    """The number of a chunk that no other thread has: the first field of the call, counted on in one go."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(call), generate


_at: Any = intrinsic(_pointer_to(types.float32))
_bytes_at: Any = intrinsic(_pointer_to(types.int8))
_take: Any = intrinsic(_number)

_inner: Any = numba.njit(error_model="numpy")

#: Sums may be added up in any order, as vectors do; nothing else changes.
_adding: Any = numba.njit(error_model="numpy", fastmath={"reassoc", "nsz"})


@_inner
def _to_codes(y, low, high):
    """Rounded half to even, and clamped; NaN stays."""
    code = np.rint(y)
    code = low if code < low else code
    return high if code > high else code


@_inner
def _quantize_values(x, out, step, low, high):
    for i in range(x.size):
        out[i] = _to_codes(x[i] / step, low, high) * step


def _quantize(call):
    its = carray(call, 1)[0]
    x, out = carray(_at(its.x), (its.count,)), carray(_at(its.out), (its.count,))
    start = _take(call) * CHUNK
    while start < its.count:
        end = min(start + CHUNK, its.count)
        _quantize_values(x[start:end], out[start:end], its.step, its.low, its.high)
        start = _take(call) * CHUNK


@_adding
def _gradients(x, grad, dx, step, low, high, lowest, highest):
    changed = outside = np.float32(0)
    for i in range(x.size):
        inside = (x[i] > lowest) & (x[i] < highest)
        passed = grad[i] if inside else np.float32(0)
        dx[i] = passed
        changed += grad[i] * (_to_codes(x[i] / step, low, high) * step - (x[i] if inside else np.float32(0)))
        outside += grad[i] - passed  # where nothing passes; a sum under a condition would be no vector
    return changed, outside


def _quantize_backward(call):
    its = carray(call, 1)[0]
    count, chunks = its.count, (its.count + CHUNK - 1) // CHUNK
    x, grad, dx = carray(_at(its.x), (count,)), carray(_at(its.grad), (count,)), carray(_at(its.dx), (count,))
    changed, outside = carray(_at(its.changed), (chunks,)), carray(_at(its.outside), (chunks,))
    chunk = _take(call)
    while chunk < chunks:
        start, end = chunk * CHUNK, min((chunk + 1) * CHUNK, count)
        changed[chunk], outside[chunk] = _gradients(
            x[start:end], grad[start:end], dx[start:end], its.step, its.low, its.high, its.lowest, its.highest
        )
        chunk = _take(call)


@_inner
def _compact_values(x, out, codes, step, low, high, shift):
    for i in range(x.size):
        code = _to_codes(x[i] / step, low, high)
        out[i] = code * step
        codes[i] = np.int8(code - shift)


@_inner
def _residual_values(x, residuals, step, low, high, lowest, highest, shift, spread, amplitude):
    for i in range(x.size):
        y = x[i] / step
        code = _to_codes(y, low, high)
        moved = np.rint((y - code) * (amplitude + amplitude))
        inside = (x[i] > lowest) & (x[i] < highest)
        residuals[i] = np.int8(moved if inside else spread * (code - shift))


def _compact(call):
    its = carray(call, 1)[0]
    count = its.count
    x, out, codes = (
        carray(_at(its.x), (count,)),
        carray(_at(its.out), (count,)),
        carray(_bytes_at(its.codes), (count,)),
    )
    residuals = carray(_bytes_at(its.residuals), (count,))
    start = _take(call) * CHUNK
    while start < count:
        end = min(start + CHUNK, count)
        _compact_values(x[start:end], out[start:end], codes[start:end], its.step, its.low, its.high, its.shift)
        if its.residuals:
            _residual_values(
                x[start:end], residuals[start:end], its.step, its.low, its.high, its.lowest, its.highest,
                its.shift, its.spread, its.amplitude,
            )  # fmt: skip
        start = _take(call) * CHUNK


@_adding
def _compact_gradients(residuals, grad, dx, lowest, highest):
    moved = ends = outside = np.float32(0)
    for i in range(grad.size):
        residual = np.float32(residuals[i])
        passed = grad[i] if (residual > lowest) & (residual < highest) else np.float32(0)
        dx[i] = passed
        held = grad[i] - passed
        moved += passed * residual
        ends += held * residual
        outside += held
    return moved, ends, outside


def _compact_backward(call):
    its = carray(call, 1)[0]
    count, chunks = its.count, (its.count + CHUNK - 1) // CHUNK
    residuals, grad = carray(_bytes_at(its.residuals), (count,)), carray(_at(its.grad), (count,))
    dx, moved = carray(_at(its.dx), (count,)), carray(_at(its.moved), (chunks,))
    ends, outside = carray(_at(its.ends), (chunks,)), carray(_at(its.outside), (chunks,))
    chunk = _take(call)
    while chunk < chunks:
        start, end = chunk * CHUNK, min((chunk + 1) * CHUNK, count)
        moved[chunk], ends[chunk], outside[chunk] = _compact_gradients(
            residuals[start:end], grad[start:end], dx[start:end], its.lowest, its.highest
        )
        chunk = _take(call)


@_inner
def _expand_values(codes, out, shift, step):
    for i in range(codes.size):
        out[i] = (np.float32(codes[i]) + shift) * step


def _expand(call):
    its = carray(call, 1)[0]
    codes, out = carray(_bytes_at(its.codes), (its.count,)), carray(_at(its.out), (its.count,))
    start = _take(call) * CHUNK
    while start < its.count:
        end = min(start + CHUNK, its.count)
        _expand_values(codes[start:end], out[start:end], its.shift, its.step)
        start = _take(call) * CHUNK


@_inner
def _factor(its, c):
    """1 / sigma and gamma / sigma of a channel; the latter is not 0 where it will be divided by."""
    inverse = np.float32(1) / np.sqrt(carray(_at(its.variance), (its.channels,))[c] + its.eps)
    factor = inverse
    if its.gamma:
        factor = carray(_at(its.gamma), (its.channels,))[c] * inverse
    if its.live and abs(factor) < SMALLEST_FACTOR:
        factor = SMALLEST_FACTOR
    return inverse, factor


@_inner
def _shift(its, c):
    """The mean of a channel, less the bias of the layer."""
    shift = carray(_at(its.mean), (its.channels,))[c]
    if its.bias:
        shift -= carray(_at(its.bias), (its.channels,))[c]
    return shift


@_inner
def _step(its, c):
    """The scale of a channel."""
    return carray(_at(its.scale), (its.channels if its.per_channel else 1,))[c if its.per_channel else 0]


@_inner
def _fold_values(weight, out, multiplier, step, low, high):
    for i in range(weight.size):
        out[i] = _to_codes(weight[i] * multiplier, low, high) * step


def _fold(call):
    its = carray(call, 1)[0]
    count, runs = its.channels * its.length, its.length // its.inner
    weight, out = carray(_at(its.weight), (count,)), carray(_at(its.out), (count,))
    first = _take(call) * its.together
    while first < its.channels:
        for c in range(first, min(first + its.together, its.channels)):
            step = _step(its, c)
            multiplier = step
            if its.variance:
                _, factor = _factor(its, c)
                multiplier = factor / step
                if its.live:
                    step /= factor
                elif its.folded:
                    beta = carray(_at(its.beta), (its.channels,))[c] if its.beta else np.float32(0)
                    carray(_at(its.folded), (its.channels,))[c] = beta - _shift(its, c) * factor
            for run in range(runs):
                start = (run * its.channels + c) * its.inner
                end = start + its.inner
                if its.variance:
                    _fold_values(weight[start:end], out[start:end], multiplier, step, its.low, its.high)
                else:
                    _quantize_values(weight[start:end], out[start:end], step, its.low, its.high)
        first = _take(call) * its.together


@_adding
def _weight_gradients(weight, grad, dweight, divides, multiplier, slope, low, high):
    """Sums of `grad` times what rounding changes, in steps, and of what passes times the weight."""
    changed = passed = np.float32(0)
    for i in range(weight.size):
        y = weight[i] / multiplier if divides else weight[i] * multiplier
        inside = (y > low) & (y < high)
        dy = grad[i] if inside else np.float32(0)
        changed += grad[i] * (_to_codes(y, low, high) - (y if inside else np.float32(0)))
        passed += dy * weight[i]
        dweight[i] = dy * slope
    return changed, passed


@_inner
def _parameter_gradients(its, c, passed, inverse, factor):
    """Of gamma and of the layer's bias."""
    grad = carray(_at(its.bias_grad), (its.channels,))[c] if its.bias_grad else np.float32(0)
    if its.dgamma:
        carray(_at(its.dgamma), (its.channels,))[c] = (passed - grad * _shift(its, c)) * inverse
    if its.dbias:
        carray(_at(its.dbias), (its.channels,))[c] = grad * factor


def _fold_backward(call):
    its = carray(call, 1)[0]
    count, runs = its.channels * its.length, its.length // its.inner
    weight, grad, dweight = (
        carray(_at(its.weight), (count,)),
        carray(_at(its.grad), (count,)),
        carray(_at(its.dweight), (count,)),
    )
    first = _take(call) * its.together
    while first < its.channels:
        for c in range(first, min(first + its.together, its.channels)):
            step = _step(its, c)
            multiplier, inverse, factor, slope = step, np.float32(1), np.float32(1), np.float32(1)
            if its.variance:
                inverse, factor = _factor(its, c)
                multiplier = factor / step
                if its.live:
                    step /= factor
                slope = multiplier * step
            changed = passed = np.float32(0)
            for run in range(runs):
                start = (run * its.channels + c) * its.inner
                end = start + its.inner
                more_changed, more_passed = _weight_gradients(
                    weight[start:end], grad[start:end], dweight[start:end],
                    its.variance == 0, multiplier, slope, its.low, its.high,
                )  # fmt: skip
                changed += more_changed
                passed += more_passed
            carray(_at(its.dscale), (its.channels,))[c] = changed * step * LN2
            if its.variance and not its.live:
                _parameter_gradients(its, c, passed, inverse, factor)
        first = _take(call) * its.together


@_adding
def _squared_error(values, step, low, high):
    error = np.float32(0)
    for i in range(values.size):
        lost = _to_codes(values[i] / step, low, high) * step - values[i]
        error += lost * lost
    return error


@_inner
def _error_of(row, step, low, high):
    """In float64, as rows may be long; a part at a time that stays in the cache."""
    error = np.float64(0)
    for start in range(0, row.size, CHUNK):
        error += _squared_error(row[start : start + CHUNK], step, low, high)
    return error


@_inner
def _search_row(row, steps, errors, its):
    """What clipping does to the two extremes of a row alone is a lower bound of its error."""
    least, greatest = np.float32(0), np.float32(0)
    for i in range(row.size):
        least, greatest = min(least, row[i]), max(greatest, row[i])
    known = _error_of(row, steps[its.first], its.low, its.high)
    for k in range(steps.size):
        clipped = max(greatest - steps[k] * its.high, steps[k] * its.low - least, np.float32(0))
        if k == its.first:
            errors[k] = known
        elif clipped * clipped <= its.certainly_worse * known:
            errors[k] = _error_of(row, steps[k], its.low, its.high)
        else:
            errors[k] = np.inf


def _search(call):
    its = carray(call, 1)[0]
    rows = carray(_at(its.rows), (its.count, its.length))
    scales = carray(_at(its.scales), (its.candidates, its.count))
    errors = carray(_at(its.errors), (its.candidates, its.count))
    first = _take(call) * its.together
    while first < its.count:
        for c in range(first, min(first + its.together, its.count)):
            _search_row(rows[c], scales[:, c], errors[:, c], its)
        first = _take(call) * its.together


def _compiled(loop: Callable[..., None], call: type[Call]) -> Any:
    """`loop` as a function of C, out of Numba's cache on disk where it is there."""
    signature = types.void(call.numba_type())
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(loop)
    except RuntimeError:  # nowhere to keep it
        return numba.cfunc(signature, error_model="numpy")(loop)


QUANTIZE = _compiled(_quantize, QuantizeCall)
QUANTIZE_BACKWARD = _compiled(_quantize_backward, QuantizeBackwardCall)
FOLD = _compiled(_fold, FoldCall)
FOLD_BACKWARD = _compiled(_fold_backward, FoldBackwardCall)
COMPACT = _compiled(_compact, CompactCall)
COMPACT_BACKWARD = _compiled(_compact_backward, CompactBackwardCall)
EXPAND = _compiled(_expand, ExpandCall)
SEARCH = _compiled(_search, SearchCall)
