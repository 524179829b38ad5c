"""An analysis as a figure, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_qat.errors import AnalysisError, printable
from hf_qat.files.atomic import whole_file
from hf_qat.model.analysis.histogram import Histogram
from hf_qat.model.analysis.layer import LayerAnalysis


#: Colours that stay apart in print and for those who see red and green alike: fine, conspicuous, losing accuracy.
COLOURS = {2: "#9ecae1", 1: "#fd8d3c", 0: "#7f2704"}
LABELS = {2: "nothing conspicuous", 1: "worth a look", 0: "loses accuracy"}

#: Ratios beyond this many dB are drawn as this many: there is nothing to see in them.
LARGEST_RATIO = 60.0

#: Inches: of a figure, of a layer in bars and in histograms, and of what stands around.
WIDTH, LINE, HISTOGRAM, MARGIN = 10.0, 0.19, 1.6, 1.5


def save_figure(layers: Sequence[LayerAnalysis], metric: str, path: Path) -> Path:
    """Write the figure to `path`, in the format of its ending.

    Raises:
        AnalysisError: matplotlib is missing, or it does not know the ending.
    """
    require_ending(path)
    figure = draw(layers, metric)
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.lower().lstrip("."), dpi=150)
    return path


def require_ending(path: Path) -> None:
    """Raise `AnalysisError` for a file that matplotlib, if it is there, cannot save a figure to."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        raise AnalysisError(f"cannot draw {path.name}: its ending must be one of {', '.join(sorted(known))}.")


def draw(layers: Sequence[LayerAnalysis], metric: str) -> Any:
    """A `matplotlib.figure.Figure`: for each layer the SQNR of its result, and the metric with it alone quantized.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    measured = any(layer.only_quantized is not None for layer in layers)
    figure = Figure(figsize=(WIDTH, MARGIN + LINE * len(layers)), layout="constrained")
    panels = figure.subplots(1, 2 if measured else 1, sharey=True, squeeze=False)[0]
    colours = [COLOURS[layer.severity] for layer in layers]
    _bars(panels[0], [layer.sqnr for layer in layers], colours, "SQNR of the result against float, dB")
    panels[0].set_yticks(range(len(layers)), [printable(layer.path) for layer in layers], fontsize=7, parse_math=False)
    panels[0].invert_yaxis()
    if measured:
        values = [layer.only_quantized or 0.0 for layer in layers]
        _bars(panels[1], values, colours, f"{metric}, with this layer alone quantized")
    shown = sorted({layer.severity for layer in layers}, reverse=True)
    patches = [Patch(color=COLOURS[severity], label=LABELS[severity]) for severity in shown]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(shown), fontsize=8)
    return figure


def _bars(panel: Any, values: list[float], colours: list[str], label: str) -> None:
    finite = [min(value, LARGEST_RATIO) if math.isfinite(value) or value > 0 else 0.0 for value in values]
    panel.barh(range(len(finite)), finite, color=colours, height=0.75)
    panel.set_xlabel(printable(label), fontsize=8, parse_math=False)
    panel.tick_params(axis="x", labelsize=8)
    panel.margins(y=0.01)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def draw_histograms(layers: Sequence[LayerAnalysis]) -> Any:
    """A `matplotlib.figure.Figure`: for each layer its weights and its results, over the numbers that codes stand for.

    Layers without either are left out; `None` if there is no other.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    shown = [layer for layer in layers if layer.weights is not None or layer.activations is not None]
    if not shown:
        return None
    figure = Figure(figsize=(WIDTH, HISTOGRAM * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for row, layer in zip(panels, shown, strict=True):
        path = printable(layer.path)
        _histogram(row[0], layer.weights, f"{path}\nweights, in steps of the codes")
        _histogram(row[1], layer.activations, f"{path}\nresults, before they are rounded")
    return figure


def _histogram(panel: Any, spread: Histogram | None, title: str) -> None:
    """Bars on a scale of logarithms, over ticks where codes are; what no code reaches is shaded."""
    if spread is None:
        panel.set_axis_off()
        return
    width = (spread.upper - spread.lower) / len(spread.counts)
    starts = [spread.lower + k * width for k in range(len(spread.counts))]
    panel.bar(starts, spread.counts, width=width, align="edge", color=COLOURS[2], linewidth=0)
    panel.set_yscale("log")
    panel.yaxis.set_minor_formatter("")
    panel.set_ylim(bottom=0.5)
    panel.vlines(spread.grid, 0.0, 0.08, transform=panel.get_xaxis_transform(), color="black", linewidth=0.4)
    for start, end in ((spread.lower, spread.first), (spread.last, spread.upper)):
        panel.axvspan(start, end, color="#dddddd", zorder=0)
    panel.set_xlim(spread.lower, spread.upper)
    panel.set_title(title, fontsize=8, loc="left", parse_math=False)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def require_matplotlib() -> None:
    """Raise `AnalysisError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise AnalysisError('figures are drawn by matplotlib, which is not installed: pip install "hf_qat[report]".')
