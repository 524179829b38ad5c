"""`convert`: from a trained, fake-quantized model to integer codes and scales, batch norm gone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import NonFiniteError, StageError
from hf_qat.graph.captured import captured_modules
from hf_qat.graph.weights import fold_weights
from hf_qat.model.eager import Model, uncompiled
from hf_qat.model.finite import require_finite
from hf_qat.model.saved_config import attach_hf_quantizer
from hf_qat.model.state import captured_children, require_ranges, require_stage
from hf_qat.quantization.converted import QuantizeDequantize, convert_layer
from hf_qat.quantization.freezable_norm import FreezableBatchNorm
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from hf_qat.quantization.scales import USABLE, unusable


@torch.no_grad()
def convert(model: Model) -> Model:
    """Exchange fake quantizers for integer codes, in place; the model is for inference from then on.

    Weights become int8 codes (int16 above 8 bits) with their scales, biases int32 with scale `s_in * s_w`, batch norms
    are folded into them and leave the model.

    Returns:
        The same object, in evaluation mode, without parameters that require gradients.

    Raises:
        StageError: not prepared, converted already, cast to another type than float32, or neither calibrated nor
            trained.
        NonFiniteError: a weight, a statistic or a range holds NaN or infinity, of which a code would show nothing; or
            a scale has vanished.
    """
    given, model = model, uncompiled(model)
    require_stage(model, Stage.PREPARED, "convert")
    _require_float32(model)
    require_finite(model, "convert")
    _require_usable_scales(model)
    require_ranges(model, "convert")
    swap_to_integer_modules(model)
    return given


def _require_float32(model: nn.Module) -> None:
    for path, quantizer in fake_quantizers(model).items():
        if quantizer.log2_scale.dtype != torch.float32:
            raise StageError(
                f"cannot convert: {path}.log2_scale is {quantizer.log2_scale.dtype}, and codes are found in float32: "
                "call model.float() first. What was rounded when the model was cast stays so."
            )


def _require_usable_scales(model: nn.Module) -> None:
    for path, quantizer in fake_quantizers(model).items():
        bad = unusable(quantizer.scale)
        if bad.numel():
            raise NonFiniteError(
                f"cannot convert: {path} of {type(model).__name__} has a scale of {bad[0].item()}, and scales are "
                f"{USABLE}. Training has diverged: load weights and scales from before it."
            )


@torch.no_grad()
def swap_to_integer_modules(model: Model) -> Model:
    """`convert` of a prepared model whose values nobody looks at: it may be on the meta device."""
    paths = {id(module): path for path, module in model.named_modules()}
    norms: set[int] = set()
    for layer in qat_layers(model).values():
        norm = layer.batch_norm
        convert_layer(layer).folded_norm = None if norm is None else paths[id(norm)]
        norms |= set() if norm is None else {id(norm)}
    for captured in captured_modules(model).values():
        fold_weights(captured)
    _drop(model, norms)
    _replace_quantizers(model)
    for captured in captured_children(model).values():
        captured.remember_places()
        object.__setattr__(captured, "capture_call", None)  # it makes graphs of fake quantizers
    require_stage(model, Stage.PREPARED, "convert").stage = Stage.CONVERTED
    if isinstance(model, PreTrainedModel):
        attach_hf_quantizer(model)
    model.eval()
    return model.requires_grad_(False)


def _drop(model: nn.Module, ids: set[int]) -> None:
    """Remove modules from wherever they are registered; containers keep their numbering."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in ids:
                parent._modules[name] = nn.Identity()


def _replace_quantizers(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, FakeQuantize):
                parent._modules[name] = QuantizeDequantize.of(child)
            elif isinstance(child, FreezableBatchNorm):
                child.batch_norm_frozen = True
