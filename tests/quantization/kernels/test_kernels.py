"""Triton's kernels against numpy and torch: on a GPU where there is one, else by Triton's interpreter.

It must be told to interpret before it is imported, so the last test runs the others in a process of their own.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hf_qat.quantization import kernels
from hf_qat.quantization.fake_quantize import fake_quantize
from hf_qat.quantization.folding import fold_fake_quantize
from hf_qat.quantization.kernels.code_range import CodeRange
from hf_qat.quantization.kernels.folding import Folding, Norm
from hf_qat.quantization.layer_folding import fold_layer
from hf_qat.quantization.learned import learned_fake_quantize
from hf_qat.quantization.learned_gradients import levels
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec


INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

needs_triton = pytest.mark.skipif(
    not INTERPRETED and not (INSTALLED and DEVICE.type == "cuda"), reason="needs a GPU, or TRITON_INTERPRET=1"
)

#: Whole exponents, whose powers are the same everywhere; offset (`None`: symmetric), codes, limit of the scale.
CASES = {
    "int8": (-4.0, None, -128, 127, None),
    "uint8": (-5.0, 0.37, 0, 255, None),
    "uint4": (-1.0, 0.52, 0, 15, None),
    "a zero point above the codes": (-4.0, 1.25, 0, 255, None),
    "a zero point below the codes": (-4.0, -0.5, -128, 127, None),
    "a limited scale": (-3.0, None, 0, 255, 6 / 255),
}

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
}


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (1, 1, 1, 1), (2, 0, 3, 3), (2, 40, 9, 17)], ids=str)
def test_values_are_those_of_numpy_bit_for_bit_in_any_layout(shape: tuple[int, ...], layout: str):
    from hf_qat.quantization.kernels.activation import quantize

    x = LAYOUTS[layout](torch.randn(shape, device=DEVICE) * 5)
    scale, zero = torch.tensor(0.0371, device=DEVICE), torch.tensor(101.0, device=DEVICE)
    out = quantize(x, scale, zero, CodeRange(0, 255, logarithmic=False))
    codes = np.clip(np.rint(numbers(x) / np.float32(0.0371)) + 101, 0, 255)
    np.testing.assert_array_equal(numbers(out), (codes - 101).astype(np.float32) * np.float32(0.0371))
    assert out.stride() == x.stride() or layout == "with gaps"


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_ties_saturation_and_nan_in_every_float_type(dtype: torch.dtype):
    from hf_qat.quantization.kernels.activation import quantize

    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0, math.inf, -math.inf, math.nan, 0.0], device=DEVICE)
    out = quantize(x.to(dtype), torch.tensor(0.0, device=DEVICE), None, CodeRange(-128, 127))
    assert out.dtype == dtype
    expected = [0, 2, 2, 0, -2, 127, -128, 127, -128, math.nan, 0]
    np.testing.assert_array_equal(numbers(out.float()), np.array(expected, dtype=np.float32))


@needs_triton
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_torch(case: tuple, sign: int):
    from hf_qat.quantization.kernels.activation import fused_fake_quantize

    log2, start, low, high, limit = case
    data, incoming = torch.randn(4, 9, 7, 5, device=DEVICE) * 6, torch.randn(4, 9, 7, 5, device=DEVICE) * sign
    results = []
    for fused in (True, False):
        x = data.clone().requires_grad_()
        log2_scale = torch.tensor(log2, device=DEVICE, requires_grad=True)
        offset = None if start is None else torch.tensor(start, device=DEVICE, requires_grad=True)
        if fused:
            codes = CodeRange(low, high, scale_limit=math.inf if limit is None else limit)
            out = fused_fake_quantize(x, log2_scale, offset, codes)
        else:
            scale = torch.exp2(log2_scale.detach())
            zero = None if offset is None else offset.detach().clamp(0, 1) * (high - low) + low
            used = scale if limit is None else scale.clamp(max=limit)
            out = learned_fake_quantize(x, log2_scale, offset, levels(used, scale, zero, low, high))
        out.backward(incoming)
        results.append([out, x.grad, log2_scale.grad, *([] if offset is None else [offset.grad])])
    assert 0 < int((results[1][1] == 0).sum()) < data.numel()
    for index, (ours, theirs) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0 if index < 2 else 1e-5, atol=0 if index < 2 else 1e-4)


@needs_triton
@pytest.mark.parametrize("kind", ["plain", "folded", "live"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 3, 10, 11)], ids=["short channels", "long channels"])
def test_folded_weight_bias_and_gradients_are_those_of_torch(shape: tuple, layout: str, axis: int, kind: str):
    channels = shape[axis]
    mean, variance = torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE) + 0.5
    start = [LAYOUTS[layout](torch.randn(shape, device=DEVICE)), torch.full((channels,), -5.0, device=DEVICE)]
    start += [torch.randn(channels, device=DEVICE) for _ in range(3)]
    incoming = torch.randn(shape, device=DEVICE), torch.randn(channels, device=DEVICE)
    results = []
    for fused in (True, False):
        leaves = [leaf.clone(memory_format=torch.preserve_format).requires_grad_() for leaf in start]
        weight, log2_scale, gamma, beta, bias = leaves
        if fused:
            norm = None if kind == "plain" else Norm(mean, variance, gamma, beta, bias)
            folding = Folding(-127, 127, axis, False, kind == "live", 1e-5, torch.float32)
            outputs = [out for out in fold_layer(weight, log2_scale, norm, folding) if out is not None]
        else:
            scale, factor = torch.exp2(log2_scale), gamma * torch.rsqrt(variance + 1e-5)
            multiplier, step = {
                "plain": (None, scale),
                "folded": (factor / scale, scale),
                "live": (factor.detach() / scale, scale / factor.detach()),
            }[kind]
            outputs = [fold_fake_quantize(weight, multiplier, step, -127, 127, axis)]
            outputs += [beta - (mean - bias) * factor] if kind == "folded" else []
        torch.autograd.backward(outputs, list(incoming[: len(outputs)]))
        results.append((outputs, [leaf.grad for leaf in leaves][: 5 if kind == "folded" else 2]))
    (outputs, gradients), (expected, expected_gradients) = results
    assert torch.equal(outputs[0], expected[0]) and outputs[0].stride() == start[0].stride()
    assert (outputs[0].abs().amax() > outputs[0].abs()).any()
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@needs_triton
def test_sums_are_the_same_in_every_run_and_over_several_turns_of_a_program():
    from hf_qat.quantization.kernels import activation

    x, grad = torch.randn(9000, device=DEVICE), torch.randn(9000, device=DEVICE)
    arguments = grad, x, torch.tensor(-5.0, device=DEVICE), torch.tensor(0.5, device=DEVICE), CodeRange(0, 63)
    sums = activation.quantize_backward(*arguments, False, True)[1]
    assert torch.equal(sums, activation.quantize_backward(*arguments, False, True)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation, "PROGRAMS", 2)
        torch.testing.assert_close(sums, activation.quantize_backward(*arguments, False, True)[1])


@needs_triton
@pytest.mark.parametrize(
    ("log2_scale", "offset", "limit"),
    [(math.nan, None, None), (math.nan, None, 6 / 255), (math.nan, 0.5, None), (-4.0, math.nan, None)],
)
def test_nothing_is_a_number_where_scale_or_offset_is_none(log2_scale, offset, limit):
    """On a GPU nobody reads them for an error: the loss must say it."""
    from hf_qat.quantization.kernels.activation import fused_fake_quantize

    codes = CodeRange(0, 255, scale_limit=math.inf if limit is None else limit)
    x = torch.tensor([-1.0, 0.0, 0.4, 1e9], device=DEVICE)
    scale = torch.tensor(log2_scale, device=DEVICE)
    zero = None if offset is None else torch.tensor(offset, device=DEVICE)
    assert fused_fake_quantize(x, scale, zero, codes).isnan().all()


@needs_triton
def test_a_quantizer_computes_by_them():
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, learned=True)).to(DEVICE)
    made.set_qparams(torch.tensor(0.125), torch.tensor(100.0))
    out = made(torch.randn(5, device=DEVICE, requires_grad=True))
    assert type(out.grad_fn).__name__ == "_FusedFakeQuantizeBackward"


@needs_triton
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_who_watches_operations_sees_them():
    scale = torch.tensor(0.5, device=DEVICE)

    def quantized(x: Tensor) -> Tensor:
        return fake_quantize(x, scale, None, -8, 7)

    x = torch.tensor([0.6, 100.0, -0.2], device=DEVICE)
    assert kernels.fuses(x)
    assert torch.jit.trace(quantized, x)(2 * x).tolist() == [1.0, 3.5, -0.5]
    rows = torch.stack([x, 2 * x])
    assert torch.func.vmap(quantized)(rows).tolist() == [[0.5, 3.5, 0.0], [1.0, 3.5, -0.5]]
    with FakeTensorMode() as mode:
        assert not kernels.fuses(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        assert not kernels.fuses(x) and quantized(x).tolist() == [0.5, 3.5, 0.0]
    negative = torch.complex(x, x).conj().imag
    assert negative.is_neg() and quantized(negative).tolist() == [-0.5, -4.0, 0.0]


def test_where_triton_does_not_run_the_log_says_so_once(caplog: pytest.LogCaptureFixture):
    kernels._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [kernels._works(torch.device("meta")) for _ in range(2)]
    kernels._works.cache_clear()
    assert found == [False, False]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Triton does not run on meta, so fake quantization is slower there"
    ]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED or DEVICE.type == "cuda" or INTERPRETED, reason="Triton is not there, or runs here")
def test_they_hold_in_the_interpreter():
    files = [__file__, str(Path(__file__).with_name("test_weights_together.py"))]
    above = Path(__file__).parents[1]
    files += [str(above / f"test_{name}.py") for name in ("layer_folding", "transforms", "divergence")]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *files]
    command += ["-W", "ignore::RuntimeWarning"]  # NumPy's, which interprets
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.replace("1 skipped", "")  # but for this one
