"""The op against numpy, against ONNX Runtime, and its gradients against the papers' formulas in float64."""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from hf_qat.quantization.fake_quantize import dequantize, fake_quantize, flat, quantize, sum_of_products


RANGES = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "narrow int8": (-127, 127),
    "uint4": (0, 15),
    "int2": (-2, 1),
}


# --- Values ----------------------------------------------------------------------------------------------------------


def along(parameter: np.ndarray, x: np.ndarray, axis: int | None) -> np.ndarray:
    if parameter.ndim == 0:
        return parameter
    assert axis is not None
    return np.expand_dims(parameter, [d for d in range(x.ndim) if d != axis % x.ndim])


def onnx_codes(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, low: int, high: int) -> np.ndarray:
    """The specification of QuantizeLinear, in float32 as it stands there; parameters broadcast."""
    with np.errstate(over="ignore"):
        return np.clip(np.rint(x / scale) + zero_point, low, high).astype(np.int32)


def onnx_values(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """The specification of DequantizeLinear."""
    return (codes - zero_point.astype(np.int32)).astype(np.float32) * scale


@cache
def onnx_runtime_session(code: str, axis: int | None) -> onnxruntime.InferenceSession:
    """x → QuantizeLinear → DequantizeLinear, with the scale and the zero point as inputs; 16 bits need opset 21."""
    opset, ir = (21, 10) if code.endswith("16") else (17, 8)
    kind = getattr(TensorProto, code.upper())
    rank = 0 if axis is None else 1
    attributes = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **attributes),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], **attributes),
        ],
        "qdq",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", "c"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, ["n"] * rank),
            helper.make_tensor_value_info("zero", kind, ["n"] * rank),
        ],
        [
            helper.make_tensor_value_info("codes", kind, ["a", "b", "c"]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bits(x: np.ndarray) -> np.ndarray:
    """Of float32, with one zero: codes have no sign of zero, floats do."""
    return (x + np.float32(0)).view(np.int32)


@st.composite
def tensors(draw: st.DrawFn, scale: np.ndarray, high: int) -> np.ndarray:
    """(3, 4, 5) float32 of all that could go wrong for `scale`, (): ties, denormals, saturation, plain values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    plain = rng.standard_normal(20) * float(scale) * draw(st.sampled_from([0.3, 40.0, 1e5]))
    ties = (rng.integers(-high - 4, high + 5, 20) + 0.5) * float(scale)
    nudged = np.nextafter(ties[:10].astype(np.float32), rng.choice([-np.inf, np.inf], 10).astype(np.float32))
    special = [0.0, -0.0, 1e-45, -1e-45, 1.1e-38, -9e-39, 3.4e38, -3.4e38, np.inf, -np.inf]
    return rng.permutation(np.concatenate([plain, ties, nudged, special])).astype(np.float32).reshape(3, 4, 5)


scales = st.floats(2.0**-40, 2.0**20, width=32).map(np.float32)


@st.composite
def cases(draw: st.DrawFn, axis: int | None, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(x, scale, zero_point)`; per channel along `axis` of `x`, if given."""
    if axis is None:
        scale = np.asarray(draw(scales))
        return draw(tensors(scale, high)), scale, np.asarray(draw(st.integers(low, high)))
    parts = [draw(cases(None, low, high)) for _ in range((3, 4, 5)[axis])]
    x = np.stack([part[0].take(i, axis) for i, part in enumerate(parts)], axis)
    return x, np.stack([part[1] for part in parts]), np.stack([part[2] for part in parts])


def run(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, low: int, high: int, axis: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Our codes and our fake-quantized values."""
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.float32)
    arguments = torch.from_numpy(x), torch.tensor(scale), zero, low, high, axis
    codes = quantize(*arguments)
    assert codes.dtype == torch.int32
    values = fake_quantize(*arguments)
    np.testing.assert_array_equal(dequantize(codes, torch.tensor(scale), zero, axis).numpy(), values.numpy())
    return codes.numpy(), values.numpy()


@pytest.mark.parametrize("axis", [None, 0, 1, 2], ids=["per tensor", "axis 0", "axis 1", "axis 2"])
@pytest.mark.parametrize("code", ["int8", "uint8", "int16", "uint16"])
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_codes_and_values_are_those_of_onnx_runtime_and_of_numpy_bit_for_bit(code, axis, data):
    low, high = RANGES[code]
    x, scale, zero_point = data.draw(cases(axis, low, high))
    codes, values = run(x, scale, zero_point, low, high, axis)

    feed = {"x": x, "scale": scale, "zero": zero_point.astype(code)}
    runtime_codes, runtime_values = onnx_runtime_session(code, axis).run(None, feed)
    np.testing.assert_array_equal(codes, runtime_codes.astype(np.int32))
    np.testing.assert_array_equal(bits(values), bits(runtime_values))

    wide_scale, wide_zero = along(scale, x, axis), along(zero_point, x, axis)
    expected = onnx_codes(x, wide_scale, wide_zero, low, high)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(bits(values), bits(onnx_values(expected, wide_scale, wide_zero)))


@pytest.mark.parametrize("kind", ["narrow int8", "uint4", "int2"])
@pytest.mark.parametrize("axis", [None, 1, -1])
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_other_ranges_of_codes_are_those_of_numpy(kind, axis, data):
    low, high = RANGES[kind]
    x, scale, _ = data.draw(cases(axis, low, high))
    codes, values = run(x, scale, None, low, high, axis)
    wide, zero = along(scale, x, axis), np.asarray(0)
    expected = onnx_codes(x, wide, zero, low, high)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(bits(values), bits(onnx_values(expected, wide, zero)))


def test_ties_go_to_the_even_code_and_the_rest_saturates():
    x = torch.tensor([-9.0, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 9.0])
    assert quantize(x, torch.tensor(0.5), torch.tensor(1.0), -3, 4).tolist() == [-3, -1, -1, 1, 1, 3, 3, 4]
    assert fake_quantize(x, torch.tensor(0.5), torch.tensor(1.0), -3, 4).tolist() == [-2, -1, -1, 0, 0, 1, 1, 1.5]


def test_a_fractional_zero_point_is_rounded():
    x = torch.linspace(-3, 3, 101)
    exact, fractional = (fake_quantize(x, torch.tensor(0.02), torch.tensor(z), 0, 255) for z in (128.0, 127.7))
    assert torch.equal(exact, fractional)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    scale = torch.tensor(0.013)
    out = fake_quantize(x, scale, None, -128, 127)
    assert out.dtype == dtype
    assert torch.equal(out, fake_quantize(x.float(), scale, None, -128, 127).to(dtype))
    out.sum().backward()
    ratio = x.float() / scale
    assert torch.equal(x.grad, ((-128 < ratio) & (ratio < 127)).to(dtype))


# --- Gradients -------------------------------------------------------------------------------------------------------
# The oracle: float64 throughout, but for the codes, which float32 defines.

SHAPE = (6, 5, 4, 3)
PLACES = {"per tensor": None, "axis 0": 0, "axis 1": 1, "last axis": -1}


def random_case(axis: int | None, low: int, high: int, affine: bool) -> dict[str, np.ndarray]:
    """x, with a tenth or more beyond either end of the range, its scale, zero point and an incoming gradient."""
    rng = np.random.default_rng(7)
    channels = () if axis is None else (SHAPE[axis],)
    scale = rng.uniform(0.02, 0.05, channels).astype(np.float32)
    zero = rng.integers(low + (high - low) // 3, high - (high - low) // 3, channels) if affine else np.zeros(channels)
    codes = rng.uniform(low - 0.2 * (high - low) - 1, high + 0.2 * (high - low) + 1, SHAPE)
    zero = np.asarray(zero, dtype=np.float32)
    x = (codes - along(zero, codes, axis)) * along(scale, codes, axis)
    return {
        "x": x.astype(np.float32),
        "scale": scale,
        "zero": zero,
        "g": rng.standard_normal(SHAPE).astype(np.float32),
    }


def sum_to(values: np.ndarray, parameter: np.ndarray, axis: int | None) -> np.ndarray:
    if parameter.ndim == 0:
        return values.sum()
    return values.sum(tuple(d for d in range(values.ndim) if d != axis % values.ndim))


def close(ours: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("axis", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", ["narrow int8", "uint8", "uint4", "int2"])
def test_the_gradient_passes_straight_through_inside_the_range_only(kind, axis, affine):
    low, high = RANGES[kind]
    case = random_case(axis, low, high, affine)
    x, scale, zero = (
        torch.tensor(case["x"], requires_grad=True),
        torch.tensor(case["scale"]),
        torch.tensor(case["zero"]),
    )
    fake_quantize(x, scale, zero if affine else None, low, high, axis).backward(torch.tensor(case["g"]))
    # Esser et al. 2020, eq. 5.
    ratio = case["x"] / along(case["scale"], case["x"], axis) + along(case["zero"], case["x"], axis)
    inside = (low < ratio) & (ratio < high)
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_array_equal(x.grad.numpy(), np.where(inside, case["g"], 0))


def test_the_gradient_is_zero_from_the_ends_of_the_range_on():
    x = torch.tensor([-1.5, -1.0, -0.99, 0.0, 0.99, 1.0, 1.5], requires_grad=True)
    fake_quantize(x, torch.tensor(0.5), None, -2, 2).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_memory_format_and_expanded_gradients_make_no_difference():
    case = random_case(None, -128, 127, affine=False)
    x = torch.tensor(case["x"]).to(memory_format=torch.channels_last).requires_grad_()
    fake_quantize(x, torch.tensor(case["scale"]), None, -128, 127).sum().backward()
    ratio = case["x"] / case["scale"]
    np.testing.assert_array_equal(x.grad.numpy(), (-128 < ratio) & (ratio < 127))


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("axis", PLACES.values(), ids=PLACES)
def test_the_formula_for_a_compiler_has_the_same_values_and_gradients(axis, affine, monkeypatch):
    """It would stop at numbers that are read from tensors, and at what is written in place."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    test_the_gradient_passes_straight_through_inside_the_range_only("uint8", axis, affine)
    test_ties_go_to_the_even_code_and_the_rest_saturates()
    test_the_gradient_is_zero_from_the_ends_of_the_range_on()


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("one", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_a_sum_of_products_is_the_same_in_every_layout(one: str, other: str):
    a, b = LAYOUTS[one](torch.randn(3, 5, 4, 6)), LAYOUTS[other](torch.randn(3, 5, 4, 6))
    expected = float((a.double().numpy() * b.double().numpy()).sum())
    assert float(sum_of_products(a, b)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "permuted"])
def test_a_dense_layout_is_flattened_without_a_copy(layout: str):
    x = LAYOUTS[layout](torch.randn(3, 5, 4, 6))
    assert flat(x).data_ptr() == x.data_ptr()
    assert torch.equal(flat(x).sort().values, x.reshape(-1).sort().values)


def test_numbers_without_axes_are_multiplied_too():
    assert float(sum_of_products(torch.tensor(3.0), torch.tensor(-2.0))) == -6.0
