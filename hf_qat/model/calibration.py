"""Post-training calibration: ranges from data and a correction of biases; with effort, codes learned from data too.

The first resort before training. Bias correction: Nagel et al. 2019, §4.2 (the empirical form).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import islice

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.checks import one_of
from hf_qat.config.qat_config import EFFORTS, QATConfig
from hf_qat.errors import CalibrationError
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.progress import Bar, length_of, progress
from hf_qat.model.batches import run_batches
from hf_qat.model.bias_correction import (
    BIAS_CORRECTION_BATCHES,
    are_perhaps_corrected,
    bias_shifts,
    corrections_taken_back,
    remember_biases,
    shift_biases,
)
from hf_qat.model.eager import Model, in_eager_mode, uncompiled
from hf_qat.model.equal_rows import warn_of_equal_rows
from hf_qat.model.equalization import equalize_if_nearer
from hf_qat.model.range_choice import choose_ranges, observe_in_several_ways
from hf_qat.model.reconstruction import reconstruct
from hf_qat.model.state import require_stage
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.collectives import min_over_ranks
from hf_qat.quantization.layers import qat_layers, quantizers_in_graphs


logger = logging.getLogger(__name__)


#: Batches that a choice between ranges averages over.
RANGE_CHOICE_BATCHES = 4

#: Of the batches, so much stays in memory to be learned from: 1700 images of 224 × 224 pixels.
MOST_KEPT_BYTES = 2**30


@in_eager_mode()
def calibrate(
    model: Model,
    batches: Iterable[Inputs],
    num_batches: int | None = None,
    bias_correction: bool | None = None,
    live_batch_norms: Sequence[nn.Module] = (),
    effort: str | None = None,
) -> Model:
    """Find the scales of a prepared model from data, in place.

    With `effort="best"`, which takes minutes, more is found. The range of a layer's input is chosen among those of
    several observers, by the error of the layer's output. Channels are made larger or smaller between two layers where
    that brings the outputs nearer to those in float: see `hf_qat.model.equalization`. Then the code of each weight,
    one of its two nearest, the scales of activations and the biases are learned, without labels, so that all quantized
    tensors come out as in float: see `hf_qat.model.reconstruction`. A few hundred images will do. Weights whose code
    is not the nearest one are moved just far enough for it to be; training can go on from there.

    Args:
        model: prepared.
        batches: tensors, tuples or dicts, as forward takes them; labels in a dict are ignored. A data loader of dicts
            will do; of one of pairs, pass the first halves: `(images for images, labels in loader)`.
        num_batches: use at most so many.
        bias_correction: shift biases so that every layer's mean output is that of the float model, or learn them with
            the rest; those that do not require gradients stay as they are. What an earlier one has added is taken back
            before, unless biases were trained or loaded since. As the model's config says, if left out; but not in a
            model that came with ranges, from a checkpoint: its biases may be corrected ones.
        live_batch_norms: batch norms that normalise by each batch meanwhile, as they are about to in training from
            scratch, where their own statistics are of nothing yet. Biases and weights then stay as they are.
        effort: `"fast"`, one pass over the batches; or `"best"`. As the model's config says, if left out.

    Returns:
        The same object. Frozen ranges are as they were, unless there were none yet.

    Raises:
        StageError: the model is not prepared.
        CalibrationError: no batch, or integers, NaN or infinities in one.
        ConfigError: another effort than these.
    """
    given, model = model, uncompiled(model)
    config = require_stage(model, Stage.PREPARED, "calibrate").config
    perhaps_corrected = are_perhaps_corrected(model)
    if bias_correction is None:
        bias_correction = _corrects_by_default(config, perhaps_corrected)
    effort = config.calibration_effort if effort is None else one_of("effort", effort, EFFORTS)
    best = effort == "best" and not live_batch_norms
    corrects = bias_correction and not live_batch_norms
    if not perhaps_corrected:
        remember_biases(model)
    with corrections_taken_back(model) if corrects else nullcontext():
        _calibrate(model, batches, num_batches, corrects, live_batch_norms, best)
    return given


def _corrects_by_default(config: QATConfig, perhaps_corrected: bool) -> bool:
    """What the recipe says, but for biases that may be corrected already."""
    if config.bias_correction and perhaps_corrected:
        logger.warning(
            "The model came with ranges, as one from a checkpoint does, and its biases stay as they are: they may "
            "have been corrected before. calibrate(..., bias_correction=True) corrects them nevertheless."
        )
    return config.bias_correction and not perhaps_corrected


def _calibrate(
    model: nn.Module,
    batches: Iterable[Inputs],
    num_batches: int | None,
    corrects_biases: bool,
    live_batch_norms: Sequence[nn.Module],
    best: bool,
) -> None:
    with progress("Calibrating", length_of(batches, num_batches), "batch") as bar:
        kept = _observe(model, islice(batches, num_batches), live_batch_norms, bar, best)
    if best:
        with progress("Calibrating after equalization", len(kept), "batch") as bar:
            equalize_if_nearer(model, kept, lambda: _observe(model, kept, live_batch_norms, bar, best))
    shifts = {}
    if corrects_biases:
        shifts = bias_shifts(model, kept[:BIAS_CORRECTION_BATCHES])
    shift_biases(reconstruct(model, kept, shifts) if best else shifts)
    if not live_batch_norms:
        warn_of_equal_rows(model, kept[:1])


def _observe(
    model: nn.Module, batches: Iterable[Inputs], live: Sequence[nn.Module], bar: Bar, best: bool
) -> list[Inputs]:
    """One pass in float that collects every range; returns the first batches, or with `best` all that are kept."""
    activations = {path: q for path, q in quantizers_in_graphs(model).items() if q.wants_range()}
    for quantizer in activations.values():
        quantizer.start_observing()
    several = observe_in_several_ways(activations.values()) if best else {}
    try:
        kept = _run_all(model, batches, live, bar, MOST_KEPT_BYTES if best else 0)
        for path, quantizer in activations.items():
            quantizer.finish_observing(path)
    finally:
        for quantizer in activations.values():
            quantizer.observer = None
    for layer in qat_layers(model).values():
        if layer.weight_quantizer.wants_range():
            layer.initialize_scale()
            layer.weight_quantizer.observed.fill_(1)
    if several:
        choose_ranges(model, several, kept[:RANGE_CHOICE_BATCHES])
    return kept


def _run_all(
    model: nn.Module, batches: Iterable[Inputs], live: Sequence[nn.Module], bar: Bar, most_bytes: int
) -> list[Inputs]:
    """Forward all batches in float; returns the first ones: as many as biases need, and more up to `most_bytes`.

    Fails in all processes if it does in one: none waits.
    """
    kept: list[Inputs] = []
    failure: CalibrationError | None = None
    try:
        with fake_quant_disabled(model):
            for batch in run_batches(model, batches, live):
                bar.update()
                most_bytes -= _bytes(batch)
                if len(kept) < BIAS_CORRECTION_BATCHES or most_bytes > 0:
                    kept.append(batch)
        if not kept:
            raise CalibrationError("calibrate got no batches: pass an iterable that yields at least one.")
    except CalibrationError as error:
        failure = error
    if not min_over_ranks(int(failure is None)):
        raise failure or CalibrationError("another process got no batch, or one that no range can come of: see there.")
    return kept


def _bytes(batch: Inputs) -> int:
    return sum(value.nbytes for value in pytree.tree_leaves(batch) if isinstance(value, Tensor))
