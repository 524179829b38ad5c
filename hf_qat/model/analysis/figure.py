"""An analysis as a figure, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_qat.errors import AnalysisError, printable
from hf_qat.files.atomic import whole_file
from hf_qat.model.analysis.layer import LayerAnalysis


#: Colours that stay apart in print and for those who see red and green alike: fine, conspicuous, losing accuracy.
COLOURS = {2: "#9ecae1", 1: "#fd8d3c", 0: "#7f2704"}
LABELS = {2: "nothing conspicuous", 1: "worth a look", 0: "loses accuracy"}

#: Ratios beyond this many dB are drawn as this many: there is nothing to see in them.
LARGEST_RATIO = 60.0

#: Inches.
WIDTH, LINE, MARGIN = 10.0, 0.19, 1.5


def save_figure(layers: Sequence[LayerAnalysis], metric: str, path: Path) -> Path:
    """Write the figure to `path`, in the format of its ending.

    Raises:
        AnalysisError: matplotlib is missing, or it does not know the ending.
    """
    figure = draw(layers, metric)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        raise AnalysisError(f"cannot draw {path.name}: its ending must be one of {', '.join(sorted(known))}.")
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.lower().lstrip("."), dpi=150)
    return path


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


def require_matplotlib() -> None:
    """Raise `AnalysisError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise AnalysisError('figures are drawn by matplotlib, which is not installed: pip install "hf_qat[plots]".')
