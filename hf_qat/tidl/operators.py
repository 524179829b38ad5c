"""The ONNX operators that TIDL's accelerator takes, and the numbers in their limits: a row per operator.

Source: edgeai-tidl-tools, docs/operators.md, "Operators Supported". Limits that need more than a number are functions
in `rules/`.
"""

from __future__ import annotations

from dataclasses import dataclass


#: More sizes above 1 than this an operator's inputs may not have: most operators, and those that multiply.
MOST_DIMS, PRODUCT_DIMS = 6, 4

#: Of batch norm, the input must have fewer axes; what a slice cuts has just so many.
BATCH_NORM_DIMS, SLICE_DIMS = 6, 4

#: Depthwise convolutions: (kernel height, kernel width, stride).
DEPTHWISE_KERNELS = frozenset({(1, 3, 1), (3, 3, 1), (3, 3, 2), (5, 5, 1), (5, 5, 2), (7, 7, 1), (7, 7, 2)})

#: Of those, the ones that tools 11.0 do not list.
DEPTHWISE_KERNELS_SINCE_11_0 = frozenset({(1, 3, 1), (5, 5, 1)})

#: The largest kernel with stride 2, and the only one with stride 4.
STRIDE_2_KERNEL, STRIDE_4_KERNEL = 7, 11

#: Max and average pooling that TI has validated: (kernel, stride).
POOLING_KERNELS = frozenset({(3, 1), (3, 2), (2, 2), (1, 1), (1, 2)})

#: Global average pooling of no more than this height × width.
GLOBAL_POOLING_PLANE = 1024

#: Transposed convolutions, all with stride 2; tools 11.0 do not list 3.
TRANSPOSED_KERNELS = frozenset({2, 3, 4})
TRANSPOSED_KERNELS_SINCE_11_0 = frozenset({3})

#: `max_num_subgraphs`: what lies beyond runs on the Arm core (examples/osrt_python/README.md).
MAX_SUBGRAPHS = 16

#: `max_num_subgraph_nodes`: a part with more is cut in two. edgeai-benchmark's figure; the default of tools 11.0, 864,
#: is less than the nodes of a ViT of 12 layers in Q/DQ.
MAX_SUBGRAPH_NODES = 2000


@dataclass(frozen=True)
class Operator:
    """What holds for every use of an operator.

    Attributes:
        layer: TIDL's name of the layer.
        dims: how many sizes above 1 its inputs may have; `None` without a limit.
        since_11_0: tools 11.0 do not list it.
    """

    layer: str
    dims: int | None = MOST_DIMS
    since_11_0: bool = False


def _rows(names: str, layer: str = "", dims: int | None = MOST_DIMS, since_11_0: bool = False) -> dict[str, Operator]:
    return {name: Operator(layer or f"TIDL_{name}Layer", dims, since_11_0) for name in names.split()}


OPERATORS: dict[str, Operator] = {
    **_rows("Conv", "TIDL_ConvolutionLayer", PRODUCT_DIMS),
    **_rows("ConvTranspose", "TIDL_Deconv2DLayer", PRODUCT_DIMS),
    **_rows("Gemm MatMul", "TIDL_InnerProductLayer", PRODUCT_DIMS),
    **_rows("AveragePool GlobalAveragePool MaxPool", "TIDL_PoolingLayer", PRODUCT_DIMS),
    **_rows("Add Mul Div Sub Max Sum", "TIDL_EltWiseLayer"),
    **_rows("Min", "TIDL_EltWiseLayer", since_11_0=True),
    **_rows("Relu", "TIDL_ReLULayer"),
    **_rows("PRelu", "TIDL_PReLULayer"),
    **_rows("LeakyRelu Clip Sigmoid Tanh HardSigmoid HardSwish Mish Sqrt Pow Log Abs Floor Exp Neg"),
    **_rows("Elu", "TIDL_ELULayer"),
    **_rows("Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh"),
    **_rows("Erf", "TIDL_IdentityLayer", None),
    **_rows("Softmax", "TIDL_SoftMaxLayer"),
    **_rows("BatchNormalization", "TIDL_BatchNormLayer"),
    **_rows("LayerNormalization", "TIDL_LayerNormLayer"),
    **_rows("InstanceNormalization", "TIDL_InstanceNormLayer"),
    **_rows("Concat Reshape Squeeze Unsqueeze Flatten Transpose Pad"),
    **_rows("Expand", since_11_0=True),
    **_rows("Slice Split", "TIDL_SliceLayer", PRODUCT_DIMS),
    **_rows("Gather", dims=None),
    **_rows("DepthToSpace SpaceToDepth", dims=PRODUCT_DIMS),
    **_rows("Resize Upsample", "TIDL_ResizeLayer", PRODUCT_DIMS),
    **_rows("ReduceMin ReduceMax", "TIDL_ReduceLayer", PRODUCT_DIMS),
    **_rows("ReduceMean ReduceSum", dims=None, since_11_0=True),
    **_rows("ArgMax", "TIDL_ArgOpLayer", PRODUCT_DIMS),
    **_rows("ArgMin", "TIDL_ArgOpLayer", PRODUCT_DIMS, since_11_0=True),
    **_rows("TopK GridSample", dims=None),
    **_rows("ScatterND ScatterElements", "TIDL_ScatterElementsLayer", PRODUCT_DIMS),
    **_rows("DeformConv", "TIDL_DeformableConvLayer", PRODUCT_DIMS),
    **_rows("Cast", dims=None),
}
