"""`model.dequantize()`: from integer codes back to the float model, in the format of its class, weights still rounded.

Batch norms that were folded into a layer come back as the identity plus the layer's bias, because the class has them.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qat.checkpoints.stored_format import quantized_layers
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.plan import join_path
from hf_qat.graph.random_state import random_state_kept
from hf_qat.quantization.class_swap import original_class
from hf_qat.quantization.converted import QuantizedLayer


Model = TypeVar("Model", bound=PreTrainedModel)

#: Epsilon of the frozen batch norms of DETR and its descendants.
FROZEN_EPS = 1e-5

#: Least weight of a batch norm without parameters, which is 1 / sigma: its square and the inverse of it are float32.
SMALLEST_WEIGHT = 1e-12


@torch.no_grad()
def dequantize_(model: Model, dtype: torch.dtype | str | None = None) -> Model:
    """Make a converted model the float model with quantized weights, in place; its activations are no longer rounded.

    Args:
        model: converted.
        dtype: of its weights; float32 if left out.

    Returns:
        The same object, in evaluation mode, with parameters that may be trained.
    """
    cls = original_class(type(model)) if isinstance(model, CapturedModule) else type(model)
    config = copy.copy(model.config)
    del config.quantization_config
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with random_state_kept(torch.get_default_device()):
        fresh = cls._from_config(config, dtype=torch.float32)
    state = fresh.state_dict()
    layers = quantized_layers(model)
    taken = {key: value for key, value in model.state_dict().items() if key in state}
    for path, layer in layers.items():
        taken |= _float_tensors(fresh, path, layer)
    fresh.load_state_dict({**state, **taken})
    fresh.to(device=model.device, dtype=dtype or torch.float32).eval()
    model.__class__ = cls
    vars(model).clear()
    vars(model).update(vars(fresh))
    return model


def _float_tensors(fresh: nn.Module, path: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    """What stands for one quantized layer, and the batch norm folded into it, in the state dict of `fresh`."""
    if hasattr(fresh.get_submodule(path), "running_mean"):
        return _norm_tensors(fresh, path, layer.weight.flatten(), layer.float_bias())
    tensors, bias = {join_path(path, "weight"): layer.weight}, layer.float_bias()
    own_bias: Any = fresh.get_submodule(path).bias
    if layer.folded_norm is None:
        return tensors if bias is None else {**tensors, join_path(path, "bias"): bias}
    assert bias is not None
    if own_bias is not None:
        tensors[join_path(path, "bias")] = torch.zeros_like(own_bias)
    return {**tensors, **_norm_tensors(fresh, layer.folded_norm, None, bias)}


def _norm_tensors(fresh: nn.Module, path: str, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
    """State of a batch norm that computes x * weight + bias: (x - 0) / sqrt(1 - eps + eps) * weight + bias."""
    norm: Any = fresh.get_submodule(path)
    ones = torch.ones_like(norm.running_mean)
    weight = ones if weight is None else weight
    bias = torch.zeros_like(ones) if bias is None else bias
    # DETR's frozen batch norms keep their epsilon in the code.
    tensors = {"running_mean": 0 * ones, "running_var": ones - getattr(norm, "eps", FROZEN_EPS)}
    if norm.weight is None:
        # x * w + b = (x + b / w) / sqrt(1 / w²): what a parameter would hold, the statistics do.
        weight = weight.clamp_min(SMALLEST_WEIGHT)
        variance = (weight.square().reciprocal() - norm.eps).clamp_min(0.0)
        tensors = {"running_mean": -bias / weight, "running_var": variance}
    else:
        tensors |= {"weight": weight, "bias": bias}
    return {join_path(path, name): value for name, value in tensors.items()}
