"""How many of the layers that run are quantized: a model that stays float unnoticed is the worst result of all."""

from __future__ import annotations

import logging

from torch import nn

from hf_qat.graph.nodes import short_name
from hf_qat.model.in_float import FloatOperation, float_operations
from hf_qat.model.plan import EXCLUDED
from hf_qat.model.python_code import ATTENTION, LAYERS
from hf_qat.quantization.layers import QATLayer, qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.quantization.weight_quantizer import WeightQuantizer


logger = logging.getLogger(__name__)

#: A smaller share of quantized layers is warned of.
EXPECTED_SHARE = 0.9

#: So many of the layers that stay float are named.
NAMED = 3


def float_layers(model: nn.Module) -> list[FloatOperation]:
    """The convolutions and linear layers that run in float though the recipe does not exclude them, largest first."""
    found = [
        operation
        for operation in float_operations(model)
        if short_name(operation.operation) in {*LAYERS, ATTENTION}
        and operation.reason != EXCLUDED
        and not isinstance(model.get_submodule(operation.path), QATLayer)  # a part's own code calls it from outside
    ]
    return sorted(found, key=lambda operation: -_size(model, operation.path))


def num_quantized_layers(model: nn.Module) -> int:
    """How many layers of a prepared model have a weight quantizer, and weights that forward computes are rounded."""
    in_graphs = sum(isinstance(quantizer, WeightQuantizer) for quantizer in fake_quantizers(model).values())
    return len(qat_layers(model)) + in_graphs


def warn_of_float_layers(model: nn.Module) -> None:
    """Say so if fewer layers are quantized than one would expect, with the largest of the others."""
    in_float, quantized = float_layers(model), num_quantized_layers(model)
    if quantized >= EXPECTED_SHARE * (quantized + len(in_float)):
        return
    logger.warning(
        "%s: only %d of the %d layers that run are quantized. The largest that stay float: %s.",
        type(model).__name__,
        quantized,
        quantized + len(in_float),
        "; ".join(f"{found.path or type(model).__name__} ({found.reason})" for found in in_float[:NAMED]),
    )


def _size(model: nn.Module, path: str) -> int:
    """How many numbers the weight of a layer has."""
    return sum(parameter.numel() for parameter in model.get_submodule(path).parameters(recurse=False))
