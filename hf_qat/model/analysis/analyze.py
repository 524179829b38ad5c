"""`analyze`: what quantization costs, layer by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import CalibrationError, StageError
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.findings import with_findings
from hf_qat.model.analysis.histogram import count, histogram
from hf_qat.model.analysis.layer import LayerAnalysis
from hf_qat.model.analysis.noise import Noise, bounds, energy, measure, sqnr
from hf_qat.model.analysis.sensitivity import Metric, Sensitivity, in_float_of, output_sqnr, sensitivities
from hf_qat.model.analysis.sites import Site, find_sites
from hf_qat.model.eager import in_eager_mode, uncompiled
from hf_qat.model.finite import require_finite
from hf_qat.model.in_float import float_operations
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.state import QATState, require_ranges, require_stage, state_of
from hf_qat.quantization.fake_quantize import along
from hf_qat.quantization.layers import QATLayer


@in_eager_mode()
def analyze(
    model: nn.Module,
    batches: Iterable[Inputs],
    reference: nn.Module | None = None,
    *,
    num_batches: int = 4,
    metric: Metric | None = None,
    sensitivity: bool = True,
) -> Analysis:
    """Compare a quantized model with its float one at every layer, and say what is worth a look.

    One pass of each model over the batches tells how far each value is off; the sensitivities take two evaluations of
    the metric for each layer.

    Args:
        model: prepared and calibrated or trained, or converted. It is left as it was.
        batches: as those of `calibrate`: tensors, tuples or dicts, without labels.
        reference: the float model to compare with. A prepared model needs none: it is compared with itself, its
            quantizers off and its biases as before their correction. Give it one after `calibrate(effort="best")`,
            which changes weights, and for biases of a model that was saved and loaded since.
        num_batches: of `batches`, how many to use.
        metric: says of the model how good it is, higher is better, such as accuracy on a few hundred labelled images.
            If left out, the signal to noise ratio in dB of the model's outputs, which needs no labels.
        sensitivity: evaluate the metric with each layer alone quantized, and with it alone in float; only a prepared
            model can.

    Raises:
        StageError: a float model; one without ranges; a converted one without `reference`.
        NonFiniteError: a weight, a statistic or a scale holds NaN or infinity.
        CalibrationError: no batch, or one that the model does not take.
    """
    model = uncompiled(model)
    state = _require_quantized(model)
    require_finite(model, "analyze")
    kept = list(islice(batches, num_batches))
    if not kept:
        raise CalibrationError("analyze got no batches: pass an iterable that yields at least one.")
    in_float = _reference(model, reference, state, kept[0])
    sites = find_sites(model)
    measured = measure(model, in_float, sites, kept)
    found: dict[str, Sensitivity] = {}
    best = None
    if sensitivity and state.stage is Stage.PREPARED:
        ask = metric or output_sqnr(kept, measured.expected)
        found, best = sensitivities(model, sites, ask), math.inf if metric is None else in_float_of(model, metric)
    return Analysis(
        layers=tuple(_layer(model, in_float, site, measured.sites[site.path], found.get(site.path)) for site in sites),
        output_sqnr=measured.outputs.ratio,
        float_operations=tuple(float_operations(model)),
        metric="output SQNR, dB" if metric is None else getattr(metric, "__name__", "metric"),
        in_float=best,
        config=state.config.with_checkpoint(None),
    )


def _require_quantized(model: nn.Module) -> QATState:
    state = state_of(model)
    if state is not None and state.stage is Stage.CONVERTED:
        return state
    state = require_stage(model, Stage.PREPARED, "analyze")
    require_ranges(model, "analyze")
    return state


def _reference(model: nn.Module, reference: nn.Module | None, state: QATState, inputs: Inputs) -> nn.Module:
    """A prepared model that computes in float when its quantizers are off, with the sites of `model`."""
    if reference is None:
        if state.stage is Stage.CONVERTED:
            raise StageError(
                "cannot analyze: a converted model holds integers alone. Pass the float model that it came from as "
                "reference=, or analyze it before convert()."
            )
        return model
    if state_of(reference) is not None:
        raise StageError(
            "reference must be the float model, and this one is prepared already: pass a copy from before."
        )
    return prepare_qat(copy.deepcopy(reference).eval(), state.config, inputs)


def _layer(
    model: nn.Module, in_float: nn.Module, site: Site, noise: Noise, sensitivity: Sensitivity | None
) -> LayerAnalysis:
    layer = LayerAnalysis(
        path=site.path,
        operation=site.operation,
        sqnr=noise.ratio,
        minimum=noise.minimum,
        maximum=noise.maximum,
        bulk=noise.bulk,
        module=site.module,
    )
    if site.quantizer is not None:
        quantizer: Any = model.get_submodule(site.quantizer)
        lower, upper = bounds(quantizer)
        layer = replace(
            layer,
            own_sqnr=sqnr(noise.own_signal, noise.own_noise),
            activation_bits=quantizer.spec.bits,
            lower=lower,
            upper=upper,
            saturated=noise.outside / max(1, noise.count),
            activations=None if noise.counts is None else histogram(noise.counts, (lower, upper), _codes(quantizer)),
        )
    if site.layer is not None:
        layer = replace(layer, **_weight(model.get_submodule(site.layer), in_float.get_submodule(site.layer)))
    if noise.channel_minimum is not None and noise.channel_maximum is not None:
        dead = noise.channel_minimum.eq(noise.channel_maximum)
        layer = replace(layer, channels=dead.numel(), dead_channels=int(dead.sum()))
    if sensitivity is not None:
        layer = replace(layer, only_quantized=sensitivity.only_quantized, only_float=sensitivity.only_float)
    return with_findings(layer)


def _weight(layer: Any, in_float: Any) -> dict[str, Any]:
    """The noise of a layer's rounded weight against the float one, batch norm folded into both; and its spread."""
    exact = in_float.float_weight().detach()
    if isinstance(layer, QATLayer):
        scale, spec = layer.device_scale(), layer.weight_quantizer.spec
        rounded = layer.folded(scale)[0].detach()
    else:
        scale, spec, rounded = layer.weight_scale, layer.weight_spec, layer.weight
    bounds = (float(spec.qmin), float(spec.qmax))
    counts = count(exact / along(scale.detach(), exact, layer.channel_axis), bounds)
    return {
        "weight_sqnr": sqnr(energy(exact), energy(rounded.double() - exact.double())),
        "weight_bits": spec.bits,
        "parameters": exact.numel(),
        "weights": histogram(counts, bounds, spec.qmax - spec.qmin + 1),
    }


def _codes(quantizer: Any) -> int:
    return int(quantizer.spec.qmax - quantizer.spec.qmin + 1)
