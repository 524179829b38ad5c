"""What an analysis says of one layer, or of one value that is rounded."""

from __future__ import annotations

from dataclasses import dataclass

from hf_qat.model.analysis.histogram import Histogram


@dataclass(frozen=True)
class Finding:
    """Something about a layer that is worth a look.

    Attributes:
        severity: 0 where accuracy is lost for certain, 1 where it may be.
        what: in words, with its figures.
        remedy: what to do, as one would write it.
    """

    severity: int
    what: str
    remedy: str


@dataclass(frozen=True)
class LayerAnalysis:
    """One site; ratios are signal to quantization noise in dB (6 dB are about one bit), shares lie between 0 and 1.

    Attributes:
        path: of the layer, or of the quantizer of another operation's result.
        operation: PyTorch's name of it, as `conv2d`.
        sqnr: of the result against that of the float model: the noise of all that was quantized before is in it.
        own_sqnr: of the rounding of the result alone; `None` where it is not rounded.
        weight_sqnr: of the rounding of the weight, batch norm folded in; `None` without one.
        weight_bits, activation_bits: widths of the codes; `None` for float.
        minimum, maximum: of the result in float.
        bulk: largest magnitude of all but 0.1 % of it.
        lower, upper: what the codes of the result reach to.
        saturated: share of the values that lie beyond.
        channels, dead_channels: of the result; a dead one is constant, whatever comes in. 0 where there are none.
        only_quantized, only_float: the metric with only this site quantized, and with only this site in float; `None`
            if that was not asked for.
        findings: what is conspicuous, the worst first.
        weights: the float weight in steps of its codes, over all channels; `None` without one.
        activations: what the quantizer was given; `None` without one.
        module: path of the module whose overrides it follows; `None` if that is not known, as of a file.
        parameters: numbers in its weight.
    """

    path: str
    operation: str
    sqnr: float
    own_sqnr: float | None = None
    weight_sqnr: float | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    minimum: float = 0.0
    maximum: float = 0.0
    bulk: float = 0.0
    lower: float | None = None
    upper: float | None = None
    saturated: float = 0.0
    channels: int = 0
    dead_channels: int = 0
    only_quantized: float | None = None
    only_float: float | None = None
    findings: tuple[Finding, ...] = ()
    weights: Histogram | None = None
    activations: Histogram | None = None
    module: str | None = None
    parameters: int = 0

    @property
    def added_noise(self) -> float:
        """The lower one of `own_sqnr` and `weight_sqnr`: what this site itself adds; infinite if nothing."""
        return min((x for x in (self.own_sqnr, self.weight_sqnr) if x is not None), default=float("inf"))

    @property
    def severity(self) -> int:
        """That of its worst finding; 2 without one."""
        return min((finding.severity for finding in self.findings), default=2)
