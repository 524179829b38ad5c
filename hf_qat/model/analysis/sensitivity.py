"""How much each site alone costs: the model with only this site quantized, and with only this site in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.plan import join_path
from hf_qat.graph.progress import progress
from hf_qat.model.analysis.noise import comparable, energy, run, sqnr
from hf_qat.model.analysis.sites import Site
from hf_qat.model.bias_correction import uncorrected
from hf_qat.model.switches import only_quantizers
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers


#: Says of a model how good it is: higher is better.
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Sensitivity:
    """The metric with only this site quantized, and with only this site in float."""

    only_quantized: float
    only_float: float


def sensitivities(model: nn.Module, sites: Sequence[Site], metric: Metric) -> dict[str, Sensitivity]:
    """Two evaluations of `metric` for each site of a prepared model.

    Biases are corrected for what all sites lose together; with one alone quantized, they are those of the float model.

    Returns:
        By path of the site; where a quantizer is shared by several sites, they are switched together.
    """
    found = {}
    with progress("Sensitivity", len(sites), "layer") as bar:
        for site in sites:
            own = own_quantizers(model, site)
            with uncorrected(model), only_quantizers(model, own):
                only_quantized = float(metric(model))
            with only_quantizers(model, {*fake_quantizers(model).values()} - own):
                only_float = float(metric(model))
            found[site.path] = Sensitivity(only_quantized, only_float)
            bar.update()
    return found


def in_float_of(model: nn.Module, metric: Metric) -> float:
    """The metric of a prepared model with nothing quantized."""
    with uncorrected(model), only_quantizers(model, ()):
        return float(metric(model))


def own_quantizers(model: nn.Module, site: Site) -> set[FakeQuantize]:
    """The quantizers of a site: of its weight, and of its result."""
    paths = [site.quantizer, None if site.layer is None else join_path(site.layer, "weight_quantizer")]
    modules = [model.get_submodule(path) for path in paths if path is not None]
    return {module for module in modules if isinstance(module, FakeQuantize)}


def output_sqnr(batches: Sequence[Inputs], expected: Sequence[Sequence[Tensor]]) -> Metric:
    """The metric where nobody gave one: SQNR in dB of what the model returns.

    Args:
        batches: what it is run on.
        expected: for each batch what the float model returns.
    """

    def metric(model: nn.Module) -> float:
        found = [comparable(run(model, batch), wanted) for batch, wanted in zip(batches, expected, strict=True)]
        pairs = [pair for of_batch in found for pair in of_batch]
        if not pairs:
            return -math.inf
        return sqnr(sum(energy(want) for _, want in pairs), sum(energy(got - want) for got, want in pairs))

    return metric
