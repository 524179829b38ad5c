"""The figures of a training: accuracy by stage, the loss, and what the quantizers did meanwhile; by matplotlib.

Colours are dark and light of one hue, and lines differ in kind, so that they are told apart in greyscale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_qat.errors import printable
from hf_qat.model.analysis.figure import require_matplotlib
from hf_qat.publish.accuracy import PREFIX, user_metrics
from hf_qat.publish.runtime_cost import RuntimeCost


DARK, LIGHT, GREY = "#08519c", "#9ecae1", "#777777"

#: Lines of as many ranges are told apart by kind and shade.
LINES = (("-", "black"), ("--", DARK), ("-.", GREY), (":", "black"), ((0, (5, 1)), LIGHT))

#: Inches.
WIDTH, HEIGHT = 8.0, 3.4

#: What a file costs: the units of both panels, and inches of each.
COST_UNITS = ("MB", "ms for an image, on ONNX Runtime, one thread of this CPU")
COST_HEIGHT = 1.4

#: Where a legend begins below its panel, as a share of the panel's height: past the name of the axis.
LEGEND = -0.25


def accuracy_figure(accuracy: Mapping[str, Mapping[str, float]], metric: str) -> Any:
    """A bar for each stage that has the metric, in order; the first one, of the float model, is light.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    stages = {stage: metrics[metric] for stage, metrics in accuracy.items() if metric in metrics}
    figure, (panel,) = _figure(1, 0.8 + 0.4 * len(stages))
    names = [stage.replace("`", "") for stage in stages]
    bars = panel.barh(names, list(stages.values()), color=[LIGHT] + [DARK] * (len(stages) - 1))
    panel.bar_label(bars, labels=[figures(value) for value in stages.values()], padding=3, fontsize=8)
    panel.margins(x=0.12)
    panel.invert_yaxis()
    panel.set_xlabel(printable(metric), parse_math=False)
    return figure


def cost_figure(cost: RuntimeCost) -> Any:
    """Two bars each, the file and the same file in float: megabytes, and milliseconds an image.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    figure, panels = _figure(2, 2 * COST_HEIGHT, sharex=False)
    pairs = ((cost.float_bytes / 1e6, cost.bytes / 1e6), (cost.float_ms, cost.ms))
    for panel, values, unit in zip(panels, pairs, COST_UNITS, strict=True):
        bars = panel.barh(["float", "quantized"], values, color=[LIGHT, DARK])
        panel.bar_label(bars, labels=[figures(value) for value in values], padding=3, fontsize=8)
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.set_xlabel(unit, fontsize=8)
    return figure


def save_accuracy(accuracy: Mapping[str, Mapping[str, float]], path: Path) -> bool:
    """Draw the first metric by stage into a PNG file, as far as there are two stages, and matplotlib is installed.

    Args:
        accuracy: what a card calls a stage → name of a metric → its value.
        path: of the file.

    Returns:
        Whether there is a figure.
    """
    metrics = [name for values in accuracy.values() for name in values]
    if not metrics or len(accuracy) < 2 or find_spec("matplotlib") is None:
        return False
    accuracy_figure(accuracy, metrics[0]).savefig(path, format="png", dpi=100)
    return True


def figures(value: float) -> str:
    """A metric with four digits, without zeros at the end: 98.33, 0.9833, 0.5."""
    return f"{value:.4g}"


def training_figure(log: Sequence[Mapping[str, Any]], moments: Mapping[str, float]) -> Any:
    """Losses over steps, and below them the user's metrics if they were measured on the way.

    Args:
        log: `trainer.state.log_history`.
        moments: what happened → after which share of the steps; marked in all panels.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    measured = [entry for entry in log if "eval_loss" in entry and entry["step"] > 0]
    first = {name: value for name, value in (measured[0] if measured else {}).items() if name.startswith(PREFIX)}
    shown = list(user_metrics(first))[:1] if len(measured) > 1 else []
    figure, panels = _figure(1 + len(shown), HEIGHT * (1 + 0.7 * len(shown)))
    _line(panels[0], log, "loss", "training loss", color=DARK, marker=".")
    if measured:
        _line(panels[0], measured, "eval_loss", "evaluation loss", color="black", linestyle="--", marker="s")
    for panel, name in zip(panels[1:], shown, strict=True):
        _line(panel, measured, PREFIX + name, name, color=DARK, marker="s")
    _finish(panels, _last_step(log), moments)
    return figure


def quantizers_figure(
    log: Sequence[Mapping[str, Any]],
    moments: Mapping[str, float],
    steps: Sequence[int],
    ranges: Mapping[str, Sequence[float]],
) -> Any:
    """What training does to quantizers: above the share of oscillating weights, below the ranges that drift most.

    Args:
        log, moments: as for `training_figure`.
        steps: at which `ranges` were looked at.
        ranges: path of a quantizer → how far its codes reach, at each step.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    figure, panels = _figure(2, 2.1 * HEIGHT)
    _line(panels[0], log, "qat_oscillating_weights", "share of weights whose code turned back", color=DARK, marker=".")
    _line(panels[0], log, "qat_clipped_weights", "share of weights beyond their codes", color="black", linestyle="--")
    drifts = {path: [_octaves(reach, found[0]) for reach in found] for path, found in ranges.items()}
    most = sorted(drifts, key=lambda path: -max(map(abs, drifts[path])))[: len(LINES)]
    for path, (style, color) in zip(most, LINES, strict=False):
        panels[1].plot(steps, drifts[path], linestyle=style, color=color, label=printable(path))
    panels[1].set_ylabel("range against the first,\nin powers of two", fontsize=8)
    _finish(panels, _last_step(log), moments)
    return figure


def _octaves(reach: float, first: float) -> float:
    return math.log2(reach / first) if reach > 0 and first > 0 else 0.0


def _last_step(log: Sequence[Mapping[str, Any]]) -> int:
    return max(int(entry["step"]) for entry in log)


def _figure(panels: int, height: float, sharex: bool = True) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=sharex, squeeze=False)[:, 0]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, labelbottom=True)
    return figure, axes


def _line(panel: Any, log: Sequence[Mapping[str, Any]], key: str, label: str, **style: Any) -> None:
    entries = [entry for entry in log if key in entry]
    values = [entry[key] for entry in entries]
    panel.plot([entry["step"] for entry in entries], values, label=printable(label), **style)


def _finish(panels: Any, last: int, moments: Mapping[str, float]) -> None:
    """The moments as lines, named above the first panel; legends below the panels, where they cover nothing."""
    for panel in panels:
        panel.set_xlabel("step", fontsize=8)
        for share in moments.values():
            panel.axvline(share * last, color=GREY, linewidth=0.8)
        legend = panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, LEGEND))
        for text in legend.get_texts():
            text.set_parse_math(False)
    for row, (name, share) in enumerate(moments.items()):
        panels[0].annotate(
            name,
            (share * last, 1.02 + 0.09 * row),
            xycoords=("data", "axes fraction"),
            ha="left" if share < 0.5 else "right",
            fontsize=8,
        )
