"""Mixed precision: from what each layer costs to the layers that get more bits, or stay in float.

Costs of layers are taken as additive, and each bit as 6 dB: then the layer that costs most gets the next wider codes
until what is left is in the budget. The additive model of accuracy and the greedy search: Nagel et al., "A white paper
on neural network quantization", 2021, 4.3 (sensitivity of single layers).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hf_qat.config.checks import number, refuse_unknown
from hf_qat.errors import ConfigError, listed


#: Widths that are tried one after the other.
WEIGHT_WIDTHS = (4, 8)
ACTIVATION_WIDTHS = (4, 8, 16)

#: From here on down there is no signal, in dB.
NO_SIGNAL = -300.0

#: What can be limited.
BUDGETS = ("at_least", "weight_bytes")


class MeasuredLayer(Protocol):
    """What is asked of an entry of `hf_qat.analyze(...).layers`."""

    @property
    def path(self) -> str:
        """Of the layer, or of another value that is rounded."""

    @property
    def module(self) -> str | None:
        """The module whose schemes hold there."""

    @property
    def weight_bits(self) -> int | None:
        """Width of the weight's codes."""

    @property
    def activation_bits(self) -> int | None:
        """Width of the codes of what it returns."""

    @property
    def weight_sqnr(self) -> float | None:
        """What rounding its weight leaves, in dB."""

    @property
    def own_sqnr(self) -> float | None:
        """What rounding its result leaves, in dB."""

    @property
    def only_quantized(self) -> float | None:
        """The metric with nothing else quantized."""

    @property
    def parameters(self) -> int:
        """Numbers in its weight."""


class Measured(Protocol):
    """What is asked of `hf_qat.analyze(...)`."""

    @property
    def layers(self) -> Sequence[MeasuredLayer]:
        """In the order in which they are computed."""

    @property
    def in_float(self) -> float | None:
        """The metric with nothing quantized."""

    @property
    def config(self) -> object:
        """The recipe of the model."""


@dataclass(frozen=True)
class Part:
    """The weights or the activations of a module, as they are or as they will be.

    Attributes:
        module: its path.
        kind: "weights" or "activations".
        bits: of the codes; `None` for float.
        cost: by the metric, or noise power relative to the signal's where the metric is a ratio in dB.
        parameters: so many numbers take `bits` each.
        whole: the module is one layer, which can stay in float.
    """

    module: str
    kind: str
    bits: int | None
    cost: float
    parameters: int
    whole: bool

    def wider(self, widest: int) -> Part | None:
        """The next step: more bits; then float; `None` where there is none."""
        widths = WEIGHT_WIDTHS if self.kind == "weights" else ACTIVATION_WIDTHS
        if self.bits is None:
            return None
        width = next_width(self.bits, widths)
        if width is not None and width <= widest:
            return replace(self, bits=width, cost=self.cost * 4.0 ** (self.bits - width))
        return replace(self, bits=None, cost=0.0) if self.whole else None

    @property
    def size(self) -> float:
        """Bytes; of float weights, four each."""
        return self.parameters * (32 if self.bits is None else self.bits) / 8


def next_width(bits: int, widths: Sequence[int]) -> int | None:
    """The first of `widths`, in rising order, that is more than `bits`."""
    return next((width for width in widths if width > bits), None)


def module_of(layer: MeasuredLayer) -> str:
    """Path of the module that overrides are written for; "" for the whole model."""
    return layer.path if layer.module is None else layer.module


def propose(
    analysis: Measured, widest: int, budget: Mapping[str, float]
) -> tuple[dict[str, dict[str, dict[str, int]]], list[str]]:
    """Overrides, and what to exclude, so that the budget is kept.

    Args:
        analysis: with sensitivities.
        widest: the most bits that the target has for activations.
        budget: as that of `QATConfig.from_analysis`.

    Raises:
        ConfigError: no sensitivities, or one that is NaN; not one budget, or one that cannot be kept.
    """
    if not isinstance(budget, Mapping) or len(budget) != 1:
        raise ConfigError(f'budget must be {{"at_least": metric}} or {{"weight_bytes": bytes}}, not {budget!r}.')
    refuse_unknown("budget", budget, BUDGETS)
    ((name, limit),) = budget.items()
    limit = number(f"budget[{name!r}]", limit, -math.inf, math.inf)
    if analysis.in_float is None or any(layer.only_quantized is None for layer in analysis.layers):
        raise ConfigError("the analysis has no sensitivities: make it with sensitivity=True, of a prepared model.")
    figures = {"the float model": analysis.in_float, **{layer.path: layer.only_quantized for layer in analysis.layers}}
    undefined = [name for name, value in figures.items() if value is not None and math.isnan(value)]
    if undefined:
        raise ConfigError(f"the metric is NaN for {listed(undefined)}: nobody can tell what bits are worth there.")
    before = list(_parts(analysis))
    reach = name == "at_least"
    after = _reach(before, analysis.in_float, limit, widest) if reach else _fill(before, limit)
    excluded = list(dict.fromkeys(part.module for part in after if part.bits is None))
    return _overrides(before, after, excluded), excluded


def _parts(analysis: Measured) -> Iterator[Part]:
    """Weights and activations of each module, with the module's cost shared out by the noise of each."""
    for layer in analysis.layers:
        assert analysis.in_float is not None and layer.only_quantized is not None
        cost = _cost(analysis.in_float, layer.only_quantized)
        noises = {"weights": _power(layer.weight_sqnr), "activations": _power(layer.own_sqnr)}
        total = sum(noises.values()) or 1.0
        module = module_of(layer)
        for kind, bits in (("weights", layer.weight_bits), ("activations", layer.activation_bits)):
            if bits is not None and module:
                parameters = layer.parameters if kind == "weights" else 0
                whole = layer.weight_bits is not None
                yield Part(module, kind, bits, cost * noises[kind] / total, parameters, whole)


def _cost(in_float: float, only_quantized: float) -> float:
    return max(0.0, in_float - only_quantized) if math.isfinite(in_float) else _power(only_quantized)


def _power(decibels: float | None) -> float:
    """Noise relative to the signal; minus infinity, noise without a signal, as a number that can be shared out."""
    return 0.0 if decibels is None else 10.0 ** (-max(decibels, NO_SIGNAL) / 10)


def _metric(in_float: float, cost: float) -> float:
    """What the metric should be where all costs add up to this."""
    if math.isfinite(in_float):
        return in_float - cost
    return math.inf if cost <= 0 else -10 * math.log10(cost)


def _reach(parts: Sequence[Part], in_float: float, at_least: float, widest: int) -> list[Part]:
    """Widen what costs most, step by step, until the metric should be reached."""
    chosen = list(parts)
    queue = [(-part.cost, place) for place, part in enumerate(chosen)]
    heapq.heapify(queue)
    while (reached := _metric(in_float, sum(part.cost for part in chosen))) < at_least:
        if not queue:
            raise ConfigError(
                f"at_least={at_least:.4g} cannot be reached: with every layer as wide as the target has it, or in "
                f"float, {reached:.4g} are to be expected, and the float model has {in_float:.4g}."
            )
        _, place = heapq.heappop(queue)
        wider = chosen[place].wider(widest)
        if wider is not None:
            chosen[place] = wider
            heapq.heappush(queue, (-wider.cost, place))
    return chosen


def _fill(parts: Sequence[Part], weight_bytes: float) -> list[Part]:
    """Widen the weights to 8 bits that save most for a byte, as long as all of them fit."""
    size = sum(part.size for part in parts)
    if size > weight_bytes:
        raise ConfigError(f"weight_bytes={weight_bytes:.0f} is less than the {size:.0f} that the weights take now.")
    chosen = list(parts)
    gains = [(part.cost / part.parameters, place) for place, part in enumerate(parts) if part.parameters]
    for _, place in sorted(gains, reverse=True):
        wider = chosen[place].wider(max(WEIGHT_WIDTHS))
        if wider is not None and wider.bits is not None and size + wider.size - chosen[place].size <= weight_bytes:
            size += wider.size - chosen[place].size
            chosen[place] = wider
    return chosen


def _overrides(
    before: Sequence[Part], after: Sequence[Part], excluded: Sequence[str]
) -> dict[str, dict[str, dict[str, int]]]:
    """The bits of what is wider now, and of all below it that is not: an override holds for what a module contains.

    Where a layer is excluded, the bits of all others: another one may be the last now, to which a target gives more.
    """
    roots = {(new.module, new.kind) for old, new in zip(before, after, strict=True) if new.bits != old.bits}
    wanted: dict[str, dict[str, dict[str, int]]] = {}
    for part in sorted(after, key=lambda part: part.module.count(".")):
        below = excluded or any(part.kind == kind and _is_in(part.module, root) for root, kind in roots)
        if part.bits is not None and part.module not in excluded and below:
            bits = wanted.setdefault(part.module, {}).setdefault(part.kind, {})
            bits["bits"] = max(part.bits, bits.get("bits", 0))
    return wanted


def _is_in(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def merged(overrides: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of which the later ones win."""
    return {**{glob: changes for glob, changes in overrides.items() if glob not in more}, **more}
