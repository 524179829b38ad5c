"""The switches of a prepared model: fake quantization off for a while, batch norm and ranges frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.model.prepare import Model
from hf_qat.model.state import require_stage
from hf_qat.quantization.layers import FreezableBatchNorm, QATLayer
from hf_qat.quantization.quantizer import fake_quantizers


@contextmanager
def fake_quant_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the prepared model computes in float, batch norm folded: to compare, or to debug.

    Raises:
        StageError: the model is not a prepared one.
    """
    require_stage(model, Stage.PREPARED, "disable fake quantization")
    quantizers = list(fake_quantizers(model).values())
    before = [quantizer.enabled for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled


def freeze_batch_norm(model: Model, frozen: bool = True) -> Model:
    """Stop batch norms from using and updating batch statistics, whatever `train()` says; `frozen=False` undoes it.

    Raises:
        StageError: the model is not a prepared one.
    """
    require_stage(model, Stage.PREPARED, "freeze batch norm")
    for module in model.modules():
        if isinstance(module, (QATLayer, FreezableBatchNorm)):
            module.batch_norm_frozen = frozen
    return model


def freeze_ranges(model: Model, frozen: bool = True) -> Model:
    """Stop scales and zero points from changing, by gradient or by running range; `frozen=False` undoes it.

    Raises:
        StageError: the model is not a prepared one.
    """
    require_stage(model, Stage.PREPARED, "freeze ranges")
    for quantizer in fake_quantizers(model).values():
        quantizer.frozen = frozen
    return model
