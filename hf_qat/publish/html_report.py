"""`report.html`: a training as one page that needs no network; readable on a phone, and in greyscale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import printable
from hf_qat.files.atomic import whole_file
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.figure import require_matplotlib
from hf_qat.model.analysis.page import as_svg, document, table_row


#: Dark and light of one hue: apart in greyscale, too.
DARK, LIGHT = "#08519c", "#9ecae1"


@dataclass(frozen=True)
class Results:
    """What a training has come to.

    Attributes:
        name: of the float model.
        config: the recipe.
        accuracy: measured as → name of a metric → its value, in order.
        log_history: `trainer.state.log_history`.
        analysis: of the trained model.
        directory: what was exported.
    """

    name: str
    config: QATConfig
    accuracy: Mapping[str, Mapping[str, float]]
    log_history: Sequence[Mapping[str, Any]]
    analysis: Analysis
    directory: Path


def save_report(results: Results, path: Path) -> Path:
    """Write the page to `path`.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    require_matplotlib()
    parts = [
        f"<p>{escape(results.name)}, for {escape(results.config.target)}.</p>",
        *_accuracy(results.accuracy),
        *_training(results),
        "<h2>Layer by layer</h2>",
        *results.analysis.sections(),
        *_files(results.directory),
        "<h2>The recipe</h2>",
        f"<pre>{escape(yaml.safe_dump(_recipe(results.config), sort_keys=False))}</pre>",
    ]
    with whole_file(path) as file:
        file.write_text(document("Quantization-aware training", parts), encoding="utf-8")
    return path


def _recipe(config: QATConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("checkpoint", "quant_method")}


def _accuracy(accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    names = list(dict.fromkeys(name for metrics in accuracy.values() for name in metrics))
    if not names:
        return []
    header = table_row(["", *names], "th")
    rows = [
        table_row([stage, *(f"{metrics[name]:.4g}" if name in metrics else "-" for name in names)], "td")
        for stage, metrics in accuracy.items()
    ]
    return [
        "<h2>Accuracy</h2>",
        f'<div class="wide"><table id="accuracy">{header}{"".join(rows)}</table></div>',
        f'<div class="wide">{as_svg(_accuracy_figure(accuracy, names[0]))}</div>',
    ]


def _accuracy_figure(accuracy: Mapping[str, Mapping[str, float]], name: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.4 * len(accuracy)), layout="constrained")
    panel = figure.subplots()
    stages = [stage for stage, metrics in accuracy.items() if name in metrics]
    values = [accuracy[stage][name] for stage in stages]
    bars = panel.barh(stages, values, color=[LIGHT] + [DARK] * (len(stages) - 1))
    panel.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel(printable(name), parse_math=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _training(results: Results) -> list[str]:
    logged = [entry for entry in results.log_history if "loss" in entry]
    if len(logged) < 2:
        return []
    return ["<h2>Training</h2>", f'<div class="wide" id="training">{as_svg(_loss_figure(results, logged))}</div>']


def _loss_figure(results: Results, logged: Sequence[Mapping[str, Any]]) -> Any:
    """Loss over steps, with the points of the schedule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panel = figure.subplots()
    steps = [entry["step"] for entry in logged]
    panel.plot(steps, [entry["loss"] for entry in logged], color=DARK, marker=".", label="training loss")
    measured = [entry for entry in results.log_history if "eval_loss" in entry and entry["step"] > 0]
    if measured:
        panel.plot(
            [entry["step"] for entry in measured],
            [entry["eval_loss"] for entry in measured],
            color="black",
            linestyle="--",
            marker="s",
            label="evaluation loss",
        )
    last = max(entry["step"] for entry in results.log_history)
    for share, name in ((results.config.freeze_bn_at, "batch norm"), (results.config.freeze_ranges_at, "ranges")):
        panel.axvline(share * last, color="grey", linewidth=0.8)
        panel.annotate(
            f"{name} frozen",
            (share * last, 1.0),
            xycoords=("data", "axes fraction"),
            ha="left" if share < 0.5 else "right",
            fontsize=8,
        )
    panel.set_xlabel("step")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    return figure


def _files(directory: Path) -> list[str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    rows = [table_row([str(path.relative_to(directory)), f"{path.stat().st_size / 1e6:.3f}"], "td") for path in files]
    header = table_row(["file", "MB"], "th")
    return ["<h2>Files</h2>", f'<div class="wide"><table id="files">{header}{"".join(rows)}</table></div>']
