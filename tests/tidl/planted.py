"""One model for every rule of `check_tidl`, which breaks it; and what they are made of."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.tidl.layers import from_text, one_layer


IMAGE = [1, 8, 16, 16]
TOKENS = [1, 17, 16]


def weights(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def conv(kernel: int, stride: int = 1, pad: int = 0, shape: list = IMAGE, group: int = 1, **more) -> onnx.ModelProto:
    channels = shape[1]
    w = weights(channels, channels // group, kernel, kernel)
    return one_layer("Conv", shape, w, strides=[stride] * 2, pads=[pad] * 4, group=group, **more)


def resize(
    factors: list[float], mode: str = "linear", where: str = "half_pixel", shape: list = IMAGE, **more
) -> onnx.ModelProto:
    scales = np.array(factors, np.float32)
    return one_layer("Resize", shape, None, scales, mode=mode, coordinate_transformation_mode=where, **more)


def qdq(
    scale: float = 0.25,
    zero: int = 0,
    kind: str = "int8",
    weight_scales: str = "ws",
    axis: int = 0,
    weight_kind: str = "int8",
    input_zero: int | None = None,
) -> onnx.ModelProto:
    """A convolution of a quantized input with quantized weights; `zero` holds for the input too, if not said."""
    scales = "float[4] ws = {0.5, 0.25, 0.125, 1}" if weight_scales == "ws" else "float ws = {0.5}"
    zeros = f"{weight_kind}[4] wz = {{0, 0, 0, 0}}" if weight_scales == "ws" else f"{weight_kind} wz = {{0}}"
    codes = ", ".join(["1"] * 16)
    return from_text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] z)
        <float s = {{{scale}}}, {kind} o = {{{zero}}}, {scales}, {zeros}, {weight_kind}[4, 4, 1, 1] w = {{{codes}}},
         {kind} oi = {{{zero if input_zero is None else input_zero}}}> {{
            q = QuantizeLinear(x, s, oi)
            d = DequantizeLinear(q, s, oi)
            v = DequantizeLinear<axis={axis}>(w, ws, wz)
            y = Conv(d, v)
            r = QuantizeLinear(y, s, o)
            z = DequantizeLinear(r, s, o)
        }}""",
        opset=21,
    )


def attention(first: str, second: str, out: str) -> onnx.ModelProto:
    """A product of two quantized activations, scaled as attention scores are."""
    return from_text(
        f"""g (float[1, 2, 8, 8] x, float[1, 2, 8, 8] y) => (float[1, 2, 8, 8] z)
        <float s = {{0.25}}, {first} a = {{0}}, {second} b = {{0}}, {out} c = {{0}}> {{
            qx = QuantizeLinear(x, s, a)
            dx = DequantizeLinear(qx, s, a)
            qy = QuantizeLinear(y, s, b)
            dy = DequantizeLinear(qy, s, b)
            p = MatMul(dx, dy)
            m = Mul(p, s)
            qz = QuantizeLinear(m, s, c)
            z = DequantizeLinear(qz, s, c)
        }}"""
    )


def quantized(
    operator: str,
    shape: str = "[1, 4, 8, 8]",
    out: str | None = None,
    zero: int = 3,
    input_zero: int = 0,
    last: bool = True,
    attributes: str = "",
    more: str = "",
) -> onnx.ModelProto:
    """An operator that takes one quantized activation, and a pair after it with a zero point; `last` leaves it out."""
    after = "r = QuantizeLinear(y, s, o) z = DequantizeLinear(r, s, o)" if last else "z = Identity(y)"
    return from_text(
        f"""g (float{shape} x) => (float{out or shape} z)
        <float s = {{0.25}}, uint8 o = {{{zero}}}, uint8 i = {{{input_zero}}}, float half = {{0.5}}> {{
            q = QuantizeLinear(x, s, i)
            d = DequantizeLinear(q, s, i)
            y = {operator}{attributes}(d{more})
            {after}
        }}"""
    )


def transposed_per_channel() -> onnx.ModelProto:
    """A transposed convolution with one scale for each output channel."""
    codes = ", ".join(["1"] * 16)
    return from_text(
        f"""g (float[1, 2, 8, 8] x) => (float[1, 2, 16, 16] z)
        <float s = {{0.25}}, int8 o = {{0}}, float[2] ws = {{0.5, 0.25}}, int8[2] wz = {{0, 0}},
         int8[2, 2, 2, 2] w = {{{codes}}}> {{
            q = QuantizeLinear(x, s, o)
            d = DequantizeLinear(q, s, o)
            v = DequantizeLinear<axis=1>(w, ws, wz)
            y = ConvTranspose<strides=[2, 2]>(d, v)
            r = QuantizeLinear(y, s, o)
            z = DequantizeLinear(r, s, o)
        }}"""
    )


def silu(inside: bool = False) -> onnx.ModelProto:
    """x · sigmoid(x) with a pair before and after it, and perhaps one inside."""
    between = "qg = QuantizeLinear(g, s, o) dg = DequantizeLinear(qg, s, o)" if inside else ""
    return from_text(
        f"""g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] z) <float s = {{0.25}}, int8 o = {{0}}> {{
            q = QuantizeLinear(x, s, o)
            d = DequantizeLinear(q, s, o)
            g = Sigmoid(d)
            {between}
            y = Mul(d, {"dg" if inside else "g"})
            r = QuantizeLinear(y, s, o)
            z = DequantizeLinear(r, s, o)
        }}"""
    )


def four_bits(kind: str = "int8", low: int = -8, high: int = 7) -> onnx.ModelProto:
    """An activation of 4 bits, as codes of 8 bits that are clipped."""
    return from_text(
        f"""g (float[1, 8] x) => (float[1, 8] z)
        <float s = {{0.5}}, {kind} o = {{0}}, {kind} low = {{{low}}}, {kind} high = {{{high}}}> {{
            q = QuantizeLinear(x, s, o)
            c = Clip(q, low, high)
            z = DequantizeLinear(c, s, o)
        }}"""
    )


def cast_inside() -> onnx.ModelProto:
    return from_text(
        "g (float[1, 8] x) => (float[1, 8] z) { a = Relu(x) b = Cast<to=10>(a) c = Cast<to=1>(b) z = Relu(c) }"
    )


def dynamic() -> onnx.ModelProto:
    return one_layer("Relu", ["batch", 8, 16, 16])


def without_shapes() -> onnx.ModelProto:
    model = from_text("g (float[1, 8] x) => (float[1, 8] z) { a = Relu(x) z = Relu(a) }")
    del model.graph.value_info[:]
    return model


def computed_shape() -> onnx.ModelProto:
    return from_text("g (float[1, 8] x, int64[2] s) => (float[8, 1] z) { z = Reshape(x, s) }")


def float_weights() -> onnx.ModelProto:
    """A quantized input that is multiplied by weights which are not."""
    model = from_text(
        """g (float[1, 4] x) => (float[1, 4] z) <float s = {0.5}, int8 o = {0}, float[4, 4] w> {
            q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o) z = MatMul(d, w) }"""
    )
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [1.0] * 16))
    del model.graph.input[1:]
    return model


#: rule → device, verdict, model. Each breaks this rule, and the verdict is what TI's table says.
PLANTED = {
    "conv-stride": ("AM68A", "arm", lambda: one_layer("Conv", IMAGE, weights(8, 8, 3, 3), strides=[1, 2])),
    "conv-kernel": ("AM68A", "arm", lambda: conv(9, 2, 4)),
    "conv-stride-4": ("AM68A", "arm", lambda: conv(5, 4, 2)),
    "conv-depthwise": ("AM68A", "arm", lambda: conv(9, 1, 4, group=8)),
    "conv-3x3-stride-3": ("AM62A", "arm", lambda: conv(3, 3)),
    "conv-padding": ("AM67A", "arm", lambda: conv(5, 1, 4, shape=[1, 8, 3, 3])),
    "conv-dims": ("AM68A", "arm", lambda: one_layer("Conv", [1, 2, 4, 8, 8], weights(2, 2, 3, 3, 3))),
    "conv-variable-weights": ("AM68A", "arm", lambda: one_layer("Conv", IMAGE, second=[8, 8, 3, 3])),
    "transposed-kernel": (
        "AM68A",
        "arm",
        lambda: one_layer("ConvTranspose", IMAGE, weights(8, 8, 5, 5), strides=[2, 2]),
    ),
    "global-pool-dims": ("AM68A", "arm", lambda: one_layer("GlobalAveragePool", [1, 2, 4, 4, 4])),
    "prelu-axis": ("AM68A", "arm", lambda: one_layer("PRelu", IMAGE, weights(16))),
    "batchnorm-dims": (
        "AM68A",
        "arm",
        lambda: one_layer("BatchNormalization", [1, 2, 1, 2, 2, 2], *[weights(2)] * 4),
    ),
    "scatter-axis": (
        "AM68A",
        "arm",
        lambda: from_text(
            "g (float[1, 1, 2, 4] x) => (float[1, 4, 2, 4] z) <float[1, 4, 2, 4] c, int64[1, 1, 2, 4] i> "
            "{ z = ScatterElements<axis = 1>(c, i, x) }"
        ),
    ),
    "unsqueeze-dims": ("AM68A", "arm", lambda: one_layer("Unsqueeze", [1, 2, 3, 1, 2, 2], ints(0))),
    "qdq-bits": ("AM68A", "refused", four_bits),
    "dynamic-ranges": ("AM68A", "warning", lambda: one_layer("DynamicQuantizeLinear", IMAGE, outputs=3)),
    "scheme-middle-zero-point": ("TDA4VM", "warning", lambda: qdq(zero=127, kind="uint8", weight_scales="one")),
    "asymmetric-input": ("AM68A", "warning", lambda: quantized("Relu", input_zero=7, zero=0)),
    "asymmetric-layer": ("AM68A", "warning", lambda: quantized("Sigmoid")),
    "asymmetric-product": ("AM68A", "warning", lambda: quantized("MatMul", more=", d")),
    "per-channel-weights": ("AM68A", "warning", transposed_per_channel),
    "pair-missing": (
        "AM68A",
        "warning",
        lambda: quantized("MaxPool", attributes="<kernel_shape = [1, 1]>", last=False),
    ),
    "pair-inside": ("AM68A", "warning", lambda: silu(inside=True)),
    "transposed-group": (
        "AM68A",
        "arm",
        lambda: one_layer("ConvTranspose", IMAGE, weights(8, 1, 4, 4), strides=[2, 2], group=8),
    ),
    "pool-kernel": ("AM68A", "arm", lambda: one_layer("MaxPool", IMAGE, kernel_shape=[5, 5], strides=[5, 5])),
    "pool-dilation": (
        "AM68A",
        "arm",
        lambda: one_layer("MaxPool", IMAGE, kernel_shape=[3, 3], strides=[1, 1], dilations=[2, 2]),
    ),
    "global-pool-plane": ("AM68A", "arm", lambda: one_layer("GlobalAveragePool", [1, 8, 64, 64])),
    "resize-factor": ("AM68A", "arm", lambda: resize([1, 1, 3, 3])),
    "resize-axes": ("AM68A", "arm", lambda: resize([1, 2, 2, 2], "nearest", "asymmetric", nearest_mode="floor")),
    "resize-mode": ("AM68A", "arm", lambda: resize([1, 1, 2, 2], "cubic")),
    "resize-coordinates": ("AM68A", "arm", lambda: resize([1, 1, 2, 2], where="align_corners")),
    "resize-rounding": ("AM68A", "arm", lambda: resize([1, 1, 2, 2], "nearest", "asymmetric")),
    "softmax-axis": ("AM68A", "arm", lambda: one_layer("Softmax", IMAGE, axis=1)),
    "layernorm-axis": (
        "AM68A",
        "arm",
        lambda: one_layer("LayerNormalization", TOKENS, weights(17, 16), axis=1),
    ),
    "erf-alone": ("AM68A", "arm", lambda: one_layer("Erf", IMAGE)),
    "concat-axis": ("AM68A", "arm", lambda: one_layer("Concat", IMAGE, second=IMAGE, axis=0)),
    "slice-step": ("AM68A", "arm", lambda: one_layer("Slice", IMAGE, ints(0), ints(16), ints(3), ints(2))),
    "slice-batch": ("AM68A", "arm", lambda: one_layer("Slice", [2, 8, 16, 16], ints(0), ints(4), ints(1))),
    "slice-dims": ("AM68A", "arm", lambda: one_layer("Slice", [1, 2, 3, 4, 5], ints(0), ints(2), ints(4))),
    "gather-indices": ("AM68A", "arm", lambda: one_layer("Gather", TOKENS, np.array(0), axis=1)),
    "gather-axis": ("AM68A", "arm", lambda: one_layer("Gather", TOKENS, ints(0), axis=2)),
    "gather-data": (
        "AM68A",
        "arm",
        lambda: from_text("g (int64[4] i) => (float[4, 2] z) <float[3, 2] t = {1,2,3,4,5,6}> { z = Gather(t, i) }"),
    ),
    "reshape-allowzero": ("AM68A", "arm", lambda: one_layer("Reshape", TOKENS, ints(1, 272), allowzero=1)),
    "reshape-variable": ("AM68A", "arm", computed_shape),
    "transpose-width": ("AM68A", "arm", lambda: one_layer("Transpose", [1, 2, 3, 4, 5], perm=[4, 0, 1, 2, 3])),
    "pad-mode": ("AM68A", "arm", lambda: one_layer("Pad", IMAGE, ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")),
    "pad-axes": ("AM68A", "arm", lambda: one_layer("Pad", IMAGE, ints(0, 1, 0, 0, 0, 0, 0, 0))),
    "pad-value": (
        "AM68A",
        "arm",
        lambda: one_layer("Pad", IMAGE, ints(0, 0, 1, 1, 0, 0, 1, 1), np.float32(1)),
    ),
    "clip-range": ("AM68A", "arm", lambda: one_layer("Clip", IMAGE, np.float32(1), np.float32(6))),
    "eltwise-inputs": ("AM68A", "arm", lambda: one_layer("Max", IMAGE, weights(*IMAGE), second=IMAGE)),
    "eltwise-vector": ("AM68A", "arm", lambda: one_layer("Mul", IMAGE, weights(16, 1))),
    "prelu-slope": ("AM68A", "arm", lambda: one_layer("PRelu", IMAGE, second=[8, 1, 1])),
    "pow-exponent": ("AM68A", "arm", lambda: one_layer("Pow", IMAGE, weights(16))),
    "cast-inside": ("AM68A", "arm", cast_inside),
    "dims": ("AM68A", "arm", lambda: one_layer("Relu", [2, 2, 2, 2, 2, 2, 2])),
    "gemm-transposed": ("AM68A", "arm", lambda: one_layer("Gemm", [16, 4], weights(16, 5), transA=1)),
    "gemm-factors": ("AM68A", "arm", lambda: one_layer("Gemm", [4, 16], weights(16, 5), weights(5), alpha=0.5)),
    "gemm-bias": ("AM68A", "arm", lambda: one_layer("Gemm", [4, 16], weights(16, 5), weights(4, 5))),
    "matmul-vector": ("AM68A", "arm", lambda: one_layer("MatMul", [4, 16], weights(16))),
    "matmul-mixed-signs": ("TDA4VM", "arm", lambda: attention("uint8", "int8", "int8")),
    "matmul-unsigned-output": ("AM68A", "arm", lambda: attention("int8", "int8", "uint8")),
    "argmax-axis": ("AM68A", "arm", lambda: one_layer("ArgMax", IMAGE, axis=3)),
    "argmax-keepdims": ("AM68A", "arm", lambda: one_layer("ArgMax", IMAGE, axis=1, keepdims=0)),
    "topk-sorted": ("AM68A", "arm", lambda: one_layer("TopK", IMAGE, ints(2), outputs=2, sorted=0)),
    "reduce-axis": ("AM68A", "arm", lambda: one_layer("ReduceMax", IMAGE, axes=[1])),
    "space-block": ("AM68A", "arm", lambda: one_layer("SpaceToDepth", [1, 8, 15, 15], blocksize=2, infer=False)),
    "no-op": ("AM68A", "arm", lambda: one_layer("Identity", IMAGE)),
    "operator": ("AM68A", "arm", lambda: one_layer("Einsum", TOKENS, equation="bnc->bcn")),
    "no-lut": ("AM62A", "warning", lambda: one_layer("Sigmoid", IMAGE)),
    "opset": ("AM68A", "refused", lambda: one_layer("Relu", IMAGE, opset=22)),
    "dynamic-shape": ("AM68A", "refused", dynamic),
    "shape-inference": ("AM68A", "refused", without_shapes),
    "batch": ("AM68A", "warning", lambda: one_layer("Relu", [4, 8, 16, 16])),
    "domain": (
        "AM68A",
        "refused",
        lambda: from_text("g (float[1, 8] x) => (float[1, 8] z) { z = my.op(x) }", imports=', "my" : 1'),
    ),
    "no-quantizers": ("AM68A", "warning", lambda: one_layer("Relu", IMAGE)),
    "qdq-type": ("AM68A", "refused", lambda: qdq(kind="int16")),
    "scheme-power-of-two": ("TDA4VM", "refused", lambda: qdq(scale=0.3, weight_scales="one")),
    "scheme-zero-point": ("TDA4VM", "refused", lambda: qdq(zero=3, weight_scales="one")),
    "scheme-per-channel": ("TDA4VM", "refused", lambda: qdq()),
    "scheme-weight-axis": ("AM68A", "refused", lambda: qdq(axis=1)),
    "integer-operator": ("AM68A", "arm", lambda: one_layer("DynamicQuantizeLinear", IMAGE, outputs=3)),
    "argmax-last": ("AM68A", "arm", lambda: one_layer("ArgMax", IMAGE, axis=1, select_last_index=1)),
    "batchnorm-training": (
        "AM68A",
        "arm",
        lambda: one_layer("BatchNormalization", IMAGE, *[weights(8)] * 4, outputs=3, training_mode=1),
    ),
    "batchnorm-variable": (
        "AM68A",
        "arm",
        lambda: one_layer("BatchNormalization", IMAGE, *[weights(8)] * 3, second=[8]),
    ),
    "clip-variable": ("AM68A", "arm", lambda: one_layer("Clip", IMAGE, second=[])),
    "deform-kernel": (
        "AM68A",
        "arm",
        lambda: one_layer("DeformConv", IMAGE, weights(8, 8, 5, 5), weights(1, 50, 12, 12), opset=19),
    ),
    "expand-variable": (
        "AM68A",
        "arm",
        lambda: from_text("g (float[1, 8] x, int64[2] s) => (float[4, 8] z) { z = Expand(x, s) }"),
    ),
    "gather-dims": ("AM68A", "arm", lambda: one_layer("Gather", [16], ints(0))),
    "gemm-variable": ("AM68A", "arm", lambda: one_layer("Gemm", [4, 16], second=[16, 5])),
    "gridsample-dims": (
        "AM68A",
        "arm",
        lambda: one_layer("GridSample", [1, 2, 4, 4, 4], weights(1, 4, 4, 4, 3), opset=20),
    ),
    "gridsample-mode": ("AM68A", "arm", lambda: one_layer("GridSample", IMAGE, weights(1, 4, 4, 2), mode="bicubic")),
    "gridsample-padding": (
        "AM68A",
        "arm",
        lambda: one_layer("GridSample", IMAGE, weights(1, 4, 4, 2), padding_mode="border"),
    ),
    "instancenorm-dims": ("AM68A", "arm", lambda: one_layer("InstanceNormalization", [1, 8], *[weights(8)] * 2)),
    "layernorm-vectors": ("AM68A", "arm", lambda: one_layer("LayerNormalization", TOKENS, weights(17, 16), axis=-1)),
    "needs-newer-tools": ("AM68A", "warning", lambda: one_layer("Min", IMAGE, second=IMAGE)),
    "no-range": ("AM68A", "warning", float_weights),
    "pad-variable": (
        "AM68A",
        "arm",
        lambda: from_text("g (float[1, 8] x, int64[4] p) => (float[1, 9] z) { z = Pad(x, p) }"),
    ),
    "pool-indices": ("AM68A", "arm", lambda: one_layer("MaxPool", IMAGE, outputs=2, kernel_shape=[1, 1])),
    "pool-storage-order": ("AM68A", "arm", lambda: one_layer("MaxPool", IMAGE, kernel_shape=[1, 1], storage_order=1)),
    "qdq-dynamic": (
        "AM68A",
        "refused",
        lambda: from_text("g (float[1, 8] x, float s) => (uint8[1, 8] z) { z = QuantizeLinear(x, s) }"),
    ),
    "qdq-scale": ("AM68A", "refused", lambda: qdq(scale=0.0)),
    "reduce-keepdims": ("AM68A", "arm", lambda: one_layer("ReduceMax", IMAGE, axes=[2], keepdims=0)),
    "resize-antialias": ("AM68A", "arm", lambda: resize([1, 1, 2, 2], antialias=1, opset=18)),
    "resize-aspect": (
        "AM68A",
        "arm",
        lambda: resize([1, 1, 2, 2], keep_aspect_ratio_policy="not_larger", opset=18),
    ),
    "resize-outside": ("AM68A", "arm", lambda: resize([1, 1, 2, 2], exclude_outside=1)),
    "scatter-data": (
        "AM68A",
        "arm",
        lambda: from_text(
            "g (float[2] x) => (float[4] z) <float[4] c = {1, 1, 1, 1}, int64[2, 1] i = {0, 3}> "
            "{ z = ScatterND(c, i, x) }"
        ),
    ),
    "scatter-reduction": (
        "AM68A",
        "arm",
        lambda: from_text(
            "g (float[2] x) => (float[4] z) <float[4] c = {0, 0, 0, 0}, int64[2] i = {0, 3}> "
            '{ z = ScatterElements<reduction = "add">(c, i, x) }'
        ),
    ),
    "scheme-activation-channels": (
        "AM68A",
        "refused",
        lambda: from_text(
            "g (float[1, 2, 4, 4] x) => (int8[1, 2, 4, 4] z) <float[2] s = {0.5, 0.25}, int8[2] o = {0, 0}> "
            "{ z = QuantizeLinear<axis = 1>(x, s, o) }"
        ),
    ),
    "slice-batch-axis": ("AM68A", "arm", lambda: one_layer("Slice", IMAGE, ints(0), ints(1), ints(0))),
    "slice-variable": (
        "AM68A",
        "arm",
        lambda: from_text(
            "g (float[1, 8] x, int64[1] a) => (float[1, n] z) <int64[1] b = {8}, int64[1] c = {1}> "
            "{ z = Slice(x, a, b, c) }"
        ),
    ),
    "space-dims": ("AM68A", "arm", lambda: one_layer("SpaceToDepth", [8, 4, 4], blocksize=2, infer=False)),
    "topk-axis": ("AM68A", "arm", lambda: one_layer("TopK", IMAGE, ints(2), outputs=2, axis=1)),
    "topk-k": (
        "AM68A",
        "arm",
        lambda: from_text("g (float[1, 8] x, int64[1] k) => (float[1, n] v, int64[1, n] i) { v, i = TopK(x, k) }"),
    ),
    "transposed-dilation": (
        "AM68A",
        "arm",
        lambda: one_layer("ConvTranspose", IMAGE, weights(8, 8, 2, 2), strides=[2, 2], dilations=[2, 2]),
    ),
}
