"""The loops that Numba compiles: values of numpy bit for bit, in any layout, on any number of threads; and when not.

Gradients are tested beside those of the other forms: `test_learned.py`, `test_layer_folding.py`.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hf_qat.quantization.fake_quantize import fake_quantize
from hf_qat.quantization.kernels import cpu
from hf_qat.quantization.kernels.folding import Folding, Norm
from hf_qat.quantization.layer_folding import fold_layer
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec
from tests.quantization.kernels.test_kernels import LAYOUTS


pytest.importorskip("numba")

from hf_qat.quantization.kernels.cpu import threads  # noqa: E402
from hf_qat.quantization.kernels.cpu.activation import quantize, quantize_backward  # noqa: E402


STEP = float(np.float32(0.0371))


@pytest.fixture(params=[1, 2, 3])
def thread_count(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def by_numpy(x: Tensor, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(x.numpy() / np.float32(STEP)), low, high) * np.float32(STEP)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (1, 1, 1, 1), (2, 0, 3, 3), (4, 40, 19, 17)], ids=str)
def test_values_are_those_of_numpy_bit_for_bit_in_any_layout(shape: tuple[int, ...], layout: str):
    x = LAYOUTS[layout](torch.randn(shape) * 5)
    out = quantize(x, STEP, -101.0, 154.0)
    np.testing.assert_array_equal(out.numpy(), by_numpy(x, -101, 154))
    assert out.stride() == x.stride() or layout == "with gaps"


def test_ties_saturation_and_nan():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0, math.inf, -math.inf, math.nan, 0.0])
    expected = np.array([0, 2, 2, 0, -2, 127, -128, 127, -128, math.nan, 0], np.float32)
    np.testing.assert_array_equal(quantize(x, 1.0, -128.0, 127.0).numpy(), expected)
    many = torch.cat([x] * 5)  # in the part of a loop that is done by vectors, too
    np.testing.assert_array_equal(quantize(many, 1.0, -128.0, 127.0).numpy(), np.tile(expected, 5))


def test_a_nan_reaches_every_gradient():
    x, grad = torch.randn(100), torch.randn(100)
    x[7] = math.nan
    assert math.isnan(quantize_backward(grad, x, 1.0, -8.0, 7.0).changed)
    grad[9] = math.nan
    dx, _, outside = quantize_backward(grad, x, 1.0, -8.0, 7.0)
    assert math.isnan(dx[9]) and math.isnan(outside)


def test_infinite_gradients_of_both_signs_add_up_to_none():
    grad = torch.full((3 * 2**14,), math.inf)  # of one sign in the first chunk, of the other in the last
    grad[2**14 :] *= -1
    found = quantize_backward(grad, torch.full_like(grad, 100.0), 1.0, -8.0, 7.0)
    assert math.isnan(found.changed) and math.isnan(found.outside)


def test_values_and_sums_are_the_same_on_any_number_of_threads(thread_count: int):
    generator = torch.Generator().manual_seed(3)
    x, grad = torch.randn(2, 300_001, generator=generator) * 4
    found = quantize_backward(grad, x, STEP, -100.0, 90.0)
    np.testing.assert_array_equal(quantize(x, STEP, -100.0, 90.0).numpy(), by_numpy(x, -100, 90))
    inside = (x > -100 * np.float32(STEP)) & (x < 90 * np.float32(STEP))
    assert torch.equal(found.dx, torch.where(inside, grad, 0.0))
    moved = torch.from_numpy(by_numpy(x, -100, 90)).double() - torch.where(inside, x.double(), 0.0)
    assert found.changed == pytest.approx(float((grad * moved).sum()), rel=1e-5)
    assert found.outside == pytest.approx(float(torch.where(inside, 0.0, grad.double()).sum()), rel=1e-4)
    again = quantize_backward(grad, x, STEP, -100.0, 90.0)
    assert (found.changed, found.outside) == (again.changed, again.outside)
    torch.set_num_threads(1)
    alone = quantize_backward(grad, x, STEP, -100.0, 90.0)
    assert (found.changed, found.outside) == (alone.changed, alone.outside)


def test_weights_are_folded_alike_on_any_number_of_threads(thread_count: int):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(257, 90, 3, 3, generator=generator).requires_grad_()
    norm = Norm(*torch.randn(5, 257, generator=generator).abs())
    folding, scales = Folding(-127, 127, 0, False, False, 1e-5, torch.float32), torch.full((257,), -5.0)
    results = []
    for count in (thread_count, 1):
        torch.set_num_threads(count)
        scales = scales.detach().requires_grad_()
        out, bias = fold_layer(weight, scales, norm, folding)
        results.append([out, bias, *torch.autograd.grad((out.square().sum() + bias.sum()), [weight, scales])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("stride", [1, 45, 1000])
def test_the_stride_of_a_single_channel_says_nothing(stride: int):
    weight = torch.randn(45).as_strided((1, 5, 3, 3), (stride, 9, 3, 1))
    folding = Folding(-127, 127, 0, False, False, 0.0, torch.float32)
    out, _ = fold_layer(weight, torch.full((1,), math.log2(STEP)), None, folding)
    np.testing.assert_allclose(out.numpy(), by_numpy(weight, -127, 127), rtol=1e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch's threads are found on Linux only")
def test_pytorchs_own_threads_are_found():
    assert threads._start_team() is not None


def test_a_quantizer_and_a_layer_compute_by_them():
    assert cpu.compiles(torch.zeros(1))  # the first time, it tries a loop
    made = FakeQuantize(QuantizerSpec(signed=False, symmetric=False, learned=True))
    made.set_qparams(torch.tensor(0.125), torch.tensor(100.0))
    with pytest.MonkeyPatch.context() as patch:
        called = []
        run = threads.run
        patch.setattr("hf_qat.quantization.kernels.cpu.activation.run", lambda *a: (called.append(a), run(*a)))
        made(torch.randn(5, requires_grad=True)).sum().backward()
    assert len(called) == 2


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, None, -8, 7)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_who_watches_operations_sees_them():
    x = torch.tensor([0.6, 100.0, -0.2])
    traced = torch.jit.trace(Quantized(), x)
    assert traced(2 * x).tolist() == [1.0, 3.5, -0.5]
    assert torch.func.vmap(Quantized())(torch.stack([x, 2 * x])).tolist() == [[0.5, 3.5, 0.0], [1.0, 3.5, -0.5]]
    with FakeTensorMode() as mode:
        assert Quantized()(mode.from_tensor(x)).shape == (3,)
    with FlopCounterMode(display=False):
        assert not cpu.compiles(x)
    assert cpu.compiles(x) and not cpu.compiles(x.double()) and not cpu.compiles(x.to("meta"))


def test_where_numba_does_not_run_the_log_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setitem(sys.modules, "hf_qat.quantization.kernels.cpu.activation", None)  # its import fails
    cpu._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [cpu.compiles(torch.zeros(1)) for _ in range(2)]
        assert Quantized()(torch.tensor([0.6])).tolist() == [0.5]
    cpu._works.cache_clear()
    assert found == [False, False]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Numba does not run here, so fake quantization is slower"
    ]


def test_numbas_own_switch_turns_them_off():
    code = "import torch; from hf_qat.quantization.kernels.cpu import compiles; print(compiles(torch.zeros(1)))"
    command, environment = [sys.executable, "-c", code], {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
