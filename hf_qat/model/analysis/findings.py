"""What is conspicuous about a layer, and the remedy in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hf_qat.config.mixed_precision import ACTIVATION_WIDTHS, module_of, next_width
from hf_qat.model.analysis.layer import Finding, LayerAnalysis


#: Signal to noise ratio, in dB, below which rounding alone hurts: one part in a hundred of the signal's power.
POOR_SQNR = 20.0

#: Bits at which rounding alone never leaves so little of a weight.
EIGHT = 8

#: A range so many times as wide as the bulk of the values was set by a few of them, and costs two bits or more.
WIDE_RANGE = 4.0

#: Below this ratio, in dB, values that lie beyond the range are what costs most.
FAIR_SQNR = 30.0

#: Share of values beyond the range from which it is too narrow, and not just clipped to save steps.
MUCH_SATURATED = 0.01


def with_findings(layer: LayerAnalysis) -> LayerAnalysis:
    """The same figures, with what is conspicuous about them."""
    return replace(layer, findings=find(layer))


def find(layer: LayerAnalysis) -> tuple[Finding, ...]:
    """The findings on one layer, the worst first."""
    return tuple(sorted(_findings(layer), key=lambda finding: finding.severity))


def _findings(layer: LayerAnalysis) -> Iterator[Finding]:
    poor_weight = layer.weight_sqnr is not None and layer.weight_sqnr < POOR_SQNR
    if poor_weight and (layer.weight_bits or 0) >= EIGHT:
        yield Finding(
            1,
            f"its weight is another one than the float model's: {layer.weight_sqnr:.0f} dB apart",
            "trained since? Then compare the model with itself, before convert(): analyze(model, batches)",
        )
    elif poor_weight:
        yield Finding(
            0,
            f"the weight keeps {layer.weight_sqnr:.0f} dB at {layer.weight_bits} bits",
            f'give it more bits: overrides={{"{module_of(layer)}": {{"weights": {{"bits": 8}}}}}}; or train it by QAT',
        )
    wide = _range_to_bulk(layer)
    if wide is not None and wide > WIDE_RANGE:
        yield Finding(
            0 if _is_poor(layer) else 1,
            f"its range reaches {wide:.0f} times as far as 99.9 % of its values, which lie within {layer.bulk:.3g}",
            'look for an outlier in the calibration images; or calibrate with activations={"observer": "percentile"}',
        )
    elif _is_poor(layer):
        yield Finding(
            0,
            f"rounding its result to {layer.activation_bits} bits leaves {layer.own_sqnr:.0f} dB",
            _more_bits(layer),
        )
    if layer.saturated > MUCH_SATURATED and (layer.own_sqnr or 0.0) < FAIR_SQNR:
        yield Finding(
            1,
            f"{layer.saturated:.1%} of its values lie beyond its range, {layer.lower:.3g} to {layer.upper:.3g}",
            "calibrate on more batches, or on images like these; in training, let ranges follow for longer "
            "(freeze_ranges_at)",
        )
    if layer.dead_channels:
        yield Finding(
            1,
            f"{layer.dead_channels} of {layer.channels} channels are constant, whatever comes in",
            "they compute nothing: prune them, or look at how the float model was trained",
        )


def _more_bits(layer: LayerAnalysis) -> str:
    """What to write so that its result has more of them.

    To exclude the layer would not help: what reads its result rounds it then.
    """
    bits = next_width(layer.activation_bits or 0, ACTIVATION_WIDTHS) or ACTIVATION_WIDTHS[-1]
    module, changes = module_of(layer), f'{{"activations": {{"bits": {bits}}}}}'
    if not module:
        return f"give all results more bits, where the target can: QATConfig(activations={{'bits': {bits}}})"
    inside = "" if module == layer.path else ", as all that is in the module"
    return f'give it more bits{inside}, where the target can: overrides={{"{module}": {changes}}}; or train it by QAT'


def _is_poor(layer: LayerAnalysis) -> bool:
    return layer.own_sqnr is not None and layer.own_sqnr < POOR_SQNR


def _range_to_bulk(layer: LayerAnalysis) -> float | None:
    """How many times as far the codes reach as the bulk of the values; `None` where no range was chosen for them."""
    if layer.lower is None or layer.upper is None or layer.bulk == 0.0:
        return None
    return max(-layer.lower, layer.upper) / layer.bulk
