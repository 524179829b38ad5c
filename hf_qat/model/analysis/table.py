"""The figures of all layers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_qat.model.analysis.layer import LayerAnalysis


HEADER = ("layer", "operation", "bits w/a", "SQNR", "weight", "own", "only it", "all but it", "saturated", "dead")


def text_table(layers: Sequence[LayerAnalysis]) -> str:
    """One line for each layer under a header, in aligned columns."""
    rows = [HEADER, *map(cells, layers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, figures to the right."""
    names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    figures = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(names + figures)


def cells(layer: LayerAnalysis) -> tuple[str, ...]:
    """The figures of one layer as text, in the columns of `HEADER`."""
    return (
        layer.path,
        layer.operation,
        f"{layer.weight_bits or '-'}/{layer.activation_bits or '-'}",
        decibels(layer.sqnr),
        decibels(layer.weight_sqnr),
        decibels(layer.own_sqnr),
        _figure(layer.only_quantized),
        _figure(layer.only_float),
        f"{layer.saturated:.2%}" if layer.activation_bits else "-",
        f"{layer.dead_channels}/{layer.channels}" if layer.channels else "-",
    )


def decibels(value: float | None) -> str:
    """A ratio; `exact` without noise, `lost` without signal, `-` without a figure."""
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "lost"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
