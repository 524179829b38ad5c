"""How much each site alone costs: the model with only this site quantized, and with only this site in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from hf_qat.graph.capture.inputs import Inputs
from hf_qat.model.analysis.noise import Noise, run, sqnr
from hf_qat.model.analysis.sites import Site
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

    Returns:
        By path of the site; where a quantizer is shared by several sites, they are switched together.
    """
    found = {}
    for site in sites:
        own = own_quantizers(model, site)
        with only(model, lambda quantizer, own=own: id(quantizer) in own):  # type: ignore[misc]
            only_quantized = float(metric(model))
        with only(model, lambda quantizer, own=own: id(quantizer) not in own):  # type: ignore[misc]
            only_float = float(metric(model))
        found[site.path] = Sensitivity(only_quantized, only_float)
    return found


def own_quantizers(model: nn.Module, site: Site) -> set[int]:
    """Identities of the quantizers of a site: of its weight, and of its result."""
    paths = [site.quantizer, None if site.layer is None else f"{site.layer}.weight_quantizer".lstrip(".")]
    return {id(model.get_submodule(path)) for path in paths if path is not None}


@contextmanager
def only(model: nn.Module, wanted: Callable[[FakeQuantize], bool]) -> Iterator[None]:
    """Inside, of the quantizers that were on those are that `wanted` says."""
    before = [(quantizer, quantizer.enabled) for quantizer in fake_quantizers(model).values()]
    for quantizer, enabled in before:
        quantizer.enabled = enabled and wanted(quantizer)
    try:
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled


def output_sqnr(batches: Sequence[Inputs], expected: Sequence[Sequence[Tensor]]) -> Metric:
    """The metric where nobody gave one: SQNR in dB of what the model returns.

    Args:
        batches: what it is run on.
        expected: for each batch what the float model returns.
    """

    def metric(model: nn.Module) -> float:
        noise = Noise()
        for batch, outputs in zip(batches, expected, strict=True):
            for wanted, actual in zip(outputs, run(model, batch), strict=True):
                noise.compare(wanted, actual)
        return sqnr(noise.signal, noise.noise)

    return metric
