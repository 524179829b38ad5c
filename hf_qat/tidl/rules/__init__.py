"""TIDL's limits, a file for each kind of layer. Importing this package fills the table in `registry.py`."""

from hf_qat.tidl.rules import (
    convolution,
    elementwise,
    model,
    moving,
    normalization,
    pooling,
    products,
    quantization,
    restrictions,
)
from hf_qat.tidl.rules.registry import GRAPH_RULES, LAYER_RULES, Finding


__all__ = [
    "GRAPH_RULES",
    "LAYER_RULES",
    "Finding",
    "convolution",
    "elementwise",
    "model",
    "moving",
    "normalization",
    "pooling",
    "products",
    "quantization",
    "restrictions",
]
