"""The switches of a prepared model: fake quantization off for a while, batch norm and ranges frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.model.eager import Model
from hf_qat.model.state import require_stage
from hf_qat.quantization.freezable_norm import FreezableBatchNorm
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers


@contextmanager
def fake_quant_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the prepared model computes in float, batch norm folded: to compare, or to debug.

    Weights and biases are as they are: those that calibration has corrected, or that were trained.

    Raises:
        StageError: the model is not a prepared one.
    """
    require_stage(model, Stage.PREPARED, "disable fake quantization")
    with only_quantizers(model, ()):
        yield


@contextmanager
def only_quantizers(model: nn.Module, wanted: Collection[FakeQuantize]) -> Iterator[None]:
    """Inside, of the quantizers that were on, those that are not `wanted` are off."""
    before = [(quantizer, quantizer.enabled) for quantizer in fake_quantizers(model).values()]
    for quantizer, enabled in before:
        quantizer.enabled = enabled and quantizer in wanted
    try:
        yield
    finally:
        for quantizer, enabled in before:
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
