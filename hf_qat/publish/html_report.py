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
from hf_qat.publish.figures import accuracy_figure, figures, quantizers_figure, training_figure


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
    range_steps: Sequence[int] = ()
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, float]:
        """What happened in training → after which share of its steps."""
        return {"batch norm frozen": self.batch_norm_frozen_at, "ranges frozen": self.config.freeze_ranges_at}


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
        *_contents(results.contents),
        *_files(results.directory),
        "<h2>The recipe</h2>",
        f'<pre id="recipe">{escape(yaml.safe_dump(_recipe(results.config), sort_keys=False))}</pre>',
    ]
    with whole_file(path) as file:
        file.write_text(document("Quantization report", parts), encoding="utf-8")
    return path


def _recipe(config: QATConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("checkpoint", "quant_method")}


def _accuracy(accuracy: Mapping[str, Mapping[str, float]]) -> list[str]:
    found = dict.fromkeys(name for metrics in accuracy.values() for name in metrics)
    names = sorted(found, key=lambda name: name.endswith("loss"))
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
        f'<div class="wide">{as_svg(accuracy_figure(accuracy, names[0]))}</div>',
    ]


def _training(results: Results) -> Iterator[str]:
    log = results.log_history
    if sum("loss" in entry for entry in log) < 2:
        return
    yield "<h2>Training</h2>"
    yield f'<div class="wide" id="training">{as_svg(training_figure(log, results.moments))}</div>'
    if results.ranges:
        drawn = quantizers_figure(log, results.moments, results.range_steps, results.ranges)
        yield "<h2>Quantizers in training</h2>"
        yield "<p>Weights that turn back and forth, and the activation ranges that moved most since the first log.</p>"
        yield f'<div class="wide" id="quantizers">{as_svg(drawn)}</div>'


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
