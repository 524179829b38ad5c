"""`report.html`: a quantization as one page that needs no network; readable on a phone, and in greyscale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hf_qat.config.qat_config import QATConfig
from hf_qat.files.atomic import whole_file
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.figure import require_matplotlib
from hf_qat.model.analysis.page import as_svg, document, table_row
from hf_qat.publish.directory import Contents
from hf_qat.publish.figures import accuracy_figure, cost_figure, figures, quantizers_figure, training_figure
from hf_qat.publish.runtime_cost import RuntimeCost


#: Names of the figures, in the order of the page.
FIGURES = ("accuracy", "cost", "training", "quantizers", "histograms", "layers")

#: Of the figures in files: what printers print.
DOTS_PER_INCH = 300


@dataclass(frozen=True)
class Results:
    """What a quantization has come to.

    Attributes:
        name: of the float model.
        config: the recipe.
        accuracy: measured as → name of a metric → its value, in order.
        analysis: of the quantized model.
        directory: what was exported.
        contents: what is known of it: how ONNX Runtime agrees, what TIDL takes; `None` if it is not known.
        log_history: `trainer.state.log_history`; empty without training.
        batch_norm_frozen_at: after which share of the steps.
        cost: bytes and time of the exported file beside the same in float; `None` if it is not known.
        range_steps, ranges: steps at which ranges were looked at, and path of a quantizer → its reach at each.
    """

    name: str
    config: QATConfig
    accuracy: Mapping[str, Mapping[str, float]]
    analysis: Analysis
    directory: Path
    contents: Contents | None = None
    log_history: Sequence[Mapping[str, Any]] = ()
    batch_norm_frozen_at: float = 0.0
    cost: RuntimeCost | None = None
    range_steps: Sequence[int] = ()
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, float]:
        """What happened in training → after which share of its steps."""
        return {"batch norm frozen": self.batch_norm_frozen_at, "ranges frozen": self.config.freeze_ranges_at}


def save_report(results: Results, path: Path) -> Path:
    """Write the page to `path`, and its figures into `figures_directory(path)`, as PNG files for papers.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    drawn = _drawn(results)
    parts = [
        f"<p>{escape(results.name)}, for {escape(results.config.target)}.</p>",
        *_accuracy(results.accuracy, drawn),
        *_cost(results.cost, drawn),
        *_training(drawn),
        "<h2>Layer by layer</h2>",
        *results.analysis.sections(drawn),
        *_contents(results.contents),
        *_files(results.directory),
        "<h2>The recipe</h2>",
        f'<pre id="recipe">{escape(yaml.safe_dump(_recipe(results.config), sort_keys=False))}</pre>',
    ]
    with whole_file(path) as file:
        file.write_text(document("Quantization report", parts), encoding="utf-8")
    for name in FIGURES:
        picture = figures_directory(path) / f"{name}.png"
        picture.unlink(missing_ok=True)  # of an earlier report
        if name in drawn:
            with whole_file(picture) as file:
                drawn[name].savefig(file, format="png", dpi=DOTS_PER_INCH)
    return path


def figures_directory(path: Path) -> Path:
    """Where the figures of a page lie as files: `report_figures` for `report.html`."""
    return path.with_name(f"{path.stem}_figures")


def _drawn(results: Results) -> dict[str, Any]:
    """The figures that there is something for, by the names of `FIGURES`; matplotlib's.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    require_matplotlib()
    log, names = results.log_history, _metrics(results.accuracy)
    drawn: dict[str, Any] = {}
    if names:
        drawn["accuracy"] = accuracy_figure(results.accuracy, names[0])
    if results.cost is not None:
        drawn["cost"] = cost_figure(results.cost)
    if sum("loss" in entry for entry in log) > 1:
        drawn["training"] = training_figure(log, results.moments)
        if results.ranges:
            drawn["quantizers"] = quantizers_figure(log, results.moments, results.range_steps, results.ranges)
    return {**drawn, **results.analysis.figures()}


def _recipe(config: QATConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("checkpoint", "quant_method")}


def _metrics(accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Names of all that was measured, the losses last."""
    found = dict.fromkeys(name for metrics in accuracy.values() for name in metrics)
    return sorted(found, key=lambda name: name.endswith("loss"))


def _accuracy(accuracy: Mapping[str, Mapping[str, float]], drawn: Mapping[str, Any]) -> list[str]:
    names = _metrics(accuracy)
    if not names:
        return []
    header = table_row(["", *names], "th")
    rows = [
        table_row(
            [stage.replace("`", ""), *(figures(metrics[name]) if name in metrics else "-" for name in names)], "td"
        )
        for stage, metrics in accuracy.items()
    ]
    return [
        "<h2>Accuracy</h2>",
        f'<div class="wide"><table id="accuracy">{header}{"".join(rows)}</table></div>',
        f'<div class="wide">{as_svg(drawn["accuracy"])}</div>',
    ]


def _cost(cost: RuntimeCost | None, drawn: Mapping[str, Any]) -> list[str]:
    if cost is None:
        return []
    size, speed = cost.bytes / cost.float_bytes, cost.ms / cost.float_ms
    rows = [
        table_row(["", "MB", "ms for an image"], "th"),
        table_row(["float", figures(cost.float_bytes / 1e6), figures(cost.float_ms)], "td"),
        table_row(["quantized", figures(cost.bytes / 1e6), figures(cost.ms)], "td"),
        table_row(["quantized / float", f"{size:.2f}", f"{speed:.2f}"], "td"),
    ]
    return [
        "<h2>Size and speed</h2>",
        "<p>Of the ONNX file, beside the same file in float: without rounding, and with weights of four bytes. The "
        "time is the median on ONNX Runtime, on one thread of the CPU that this page was written on. The chip has "
        "times of its own, which this does not tell.</p>",
        f'<div class="wide"><table id="cost">{"".join(rows)}</table></div>',
        f'<div class="wide" id="cost-figure">{as_svg(drawn["cost"])}</div>',
    ]


def _training(drawn: Mapping[str, Any]) -> Iterator[str]:
    if "training" in drawn:
        yield "<h2>Training</h2>"
        yield f'<div class="wide" id="training">{as_svg(drawn["training"])}</div>'
    if "quantizers" in drawn:
        yield "<h2>Quantizers in training</h2>"
        yield "<p>Weights that turn back and forth, and the activation ranges that moved most since the first log.</p>"
        yield f'<div class="wide" id="quantizers">{as_svg(drawn["quantizers"])}</div>'


def _contents(contents: Contents | None) -> Iterator[str]:
    if contents is None:
        return
    file = str(contents.onnx).replace(str(contents.onnx.path), contents.onnx.path.name)
    yield "<h2>On ONNX Runtime</h2>"
    yield f'<pre id="onnx">{escape(file)}</pre>'
    if contents.tidl is not None:
        check = str(contents.tidl).replace(str(contents.tidl.path), contents.tidl.path.name)
        yield "<h2>What TIDL takes</h2>"
        yield f'<pre id="tidl">{escape(check)}</pre>'
    elif contents.why_no_tidl:
        yield f"<h2>What TIDL takes</h2><p>There is no bundle for TIDL: {escape(contents.why_no_tidl)}</p>"


def _files(directory: Path) -> list[str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    rows = [table_row([str(path.relative_to(directory)), f"{path.stat().st_size / 1e6:.3f}"], "td") for path in files]
    header = table_row(["file", "MB"], "th")
    return ["<h2>Files</h2>", f'<div class="wide"><table id="files">{header}{"".join(rows)}</table></div>']
