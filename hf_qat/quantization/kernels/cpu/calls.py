"""What the loops are told: structures of C, which are handed over by their address."""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
from numba import types


class Call(ctypes.Structure):
    """What a loop is told; addresses are of float32, 0 for what there is none of.

    Attributes:
        taken: number of chunks that threads have taken.
    """

    @classmethod
    def numba_type(cls) -> Any:
        """As a loop sees it: a pointer to it."""
        return types.CPointer(numba.from_dtype(np.dtype(cls)))


class QuantizeCall(Call):
    """`out[i] = clamp(round(x[i] / step), low, high) * step` for `count` values."""

    _fields_ = [
        ("taken", ctypes.c_int64),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("x", "out")),
        *((name, ctypes.c_float) for name in ("step", "low", "high")),
    ]


class QuantizeBackwardCall(Call):
    """The gradient `dx`, and sums of each chunk: of `grad` times what rounding changes, and of `grad` outside.

    Inside is what lies between `lowest` and `highest`.
    """

    _fields_ = [
        *QuantizeCall._fields_[:2],
        *((name, ctypes.c_int64) for name in ("x", "grad", "dx", "changed", "outside")),
        *((name, ctypes.c_float) for name in ("step", "low", "high", "lowest", "highest")),
    ]


_FOLD: list[Any] = [
    ("taken", ctypes.c_int64),
    *((name, ctypes.c_int64) for name in ("channels", "length", "inner", "together", "per_channel", "live")),
    *((name, ctypes.c_int64) for name in ("weight", "scale", "variance", "gamma", "mean", "bias")),
    *((name, ctypes.c_float) for name in ("low", "high", "eps")),
]


class FoldCall(Call):
    """See `hf_qat.quantization.layer_folding.fold_layer`.

    The values of a channel, `length` in all, lie in runs of `inner`, one of each channel after the other. A thread
    takes `together` channels at a time.
    """

    _fields_ = [*_FOLD, *((name, ctypes.c_int64) for name in ("beta", "out", "folded"))]


class FoldBackwardCall(Call):
    """Its gradients: of the weights, and of the parameters of each channel."""

    _fields_ = [
        *_FOLD,
        *((name, ctypes.c_int64) for name in ("grad", "bias_grad", "dweight", "dscale", "dgamma", "dbias")),
    ]


class CompactCall(Call):
    """`QuantizeCall`, and a byte each: `round(x / step)`, clamped, less `shift`, and how it was rounded.

    See `hf_qat.quantization.residuals`: a byte says by how many parts of a step, of which half a step has `amplitude`,
    or `spread` times the code less `shift` where nothing passes. Bytes are written where there is an address for them.
    """

    _fields_ = [
        *QuantizeCall._fields_[:2],
        *((name, ctypes.c_int64) for name in ("x", "out", "codes", "residuals")),
        *((name, ctypes.c_float) for name in ("step", "low", "high", "lowest", "highest")),
        *((name, ctypes.c_float) for name in ("shift", "spread", "amplitude")),
    ]


class CompactBackwardCall(Call):
    """The gradient `dx` where a residual lies between `lowest` and `highest`, and sums of each chunk.

    Those of `grad` times the residual, inside and outside, and of `grad` outside.
    """

    _fields_ = [
        *QuantizeCall._fields_[:2],
        *((name, ctypes.c_int64) for name in ("residuals", "grad", "dx", "moved", "ends", "outside")),
        *((name, ctypes.c_float) for name in ("lowest", "highest")),
    ]


class ExpandCall(Call):
    """`out[i] = (codes[i] + shift) * step`."""

    _fields_ = [
        *QuantizeCall._fields_[:2],
        *((name, ctypes.c_int64) for name in ("codes", "out")),
        *((name, ctypes.c_float) for name in ("shift", "step")),
    ]


class SearchCall(Call):
    """Squared errors of `rows`, (count, length), quantized with each of `scales`, (candidates, count).

    They are written into `errors`, laid out as `scales`: infinity for what is certain to be worse than number `first`.
    A thread takes `together` rows at a time.
    """

    _fields_ = [
        *QuantizeCall._fields_[:2],
        *((name, ctypes.c_int64) for name in ("length", "candidates", "first", "together")),
        *((name, ctypes.c_int64) for name in ("rows", "scales", "errors")),
        *((name, ctypes.c_float) for name in ("low", "high", "certainly_worse")),
    ]
