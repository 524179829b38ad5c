"""What each TIDL layer takes of a pre-quantized model, as data: a row per ONNX operator.

Source: edgeai-tidl-tools, docs/quantization.md, "TIDL Layer Quantization Restrictions" (8 bits). Operators that it
does not name have no row.
"""

from __future__ import annotations

from dataclasses import dataclass


LAYER_TABLE_DOC = "edgeai-tidl-tools, docs/quantization.md, TIDL Layer Quantization Restrictions"


@dataclass(frozen=True)
class LayerRow:
    """One row.

    Attributes:
        asymmetric: its activations may have a zero point.
        pair: it wants a Q/DQ pair of its own after it.
        per_tensor: its weights have one scale.
    """

    asymmetric: bool = False
    pair: bool = True
    per_tensor: bool = False


def _rows(names: str, row: LayerRow) -> dict[str, LayerRow]:
    return dict.fromkeys(names.split(), row)


#: Of the products, `MatMul` of two activations takes no zero point: see `rules/restrictions.py`. `ArgMax`, `ArgMin`
#: and `TopK` hand out positions, which nothing quantizes.
LAYER_TABLE: dict[str, LayerRow] = {
    **_rows("Conv Gemm MatMul Softmax Concat LayerNormalization Add", LayerRow(asymmetric=True)),
    **_rows("Flatten Reshape Transpose", LayerRow(asymmetric=True, pair=False)),
    **_rows("ConvTranspose DeformConv BatchNormalization PRelu", LayerRow(per_tensor=True)),
    **_rows("Mul Div Sub Max Min Sum", LayerRow()),
    **_rows("AveragePool GlobalAveragePool MaxPool Resize Upsample ReduceMin ReduceMax", LayerRow()),
    **_rows("Relu Sigmoid Tanh HardSigmoid Elu", LayerRow()),
    **_rows("Gather ScatterND ScatterElements GridSample DepthToSpace", LayerRow()),
    **_rows("Split Slice Pad Squeeze ArgMax ArgMin TopK", LayerRow(pair=False)),
}

#: These need no pair where a ReLU with a pair follows, and the first two none where a batch norm with a pair does.
BEFORE_RELU = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "Add", "Mul", "Sub", "Div"})
BEFORE_BATCH_NORM = frozenset({"Conv", "ConvTranspose"})
