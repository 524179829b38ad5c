"""`Analysis`: what `analyze` returns; to read, to plot, to open in a browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_qat.config.qat_config import QATConfig
from hf_qat.files.atomic import whole_file
from hf_qat.model.analysis.figure import draw, draw_histograms, save_figure
from hf_qat.model.analysis.layer import LayerAnalysis
from hf_qat.model.analysis.page import document, sections
from hf_qat.model.analysis.table import decibels, text_table
from hf_qat.model.in_float import FloatOperation, by_reason


@dataclass(frozen=True)
class Analysis:
    """The layers of a quantized model, in the order in which they are computed.

    Attributes:
        layers: one entry for each layer, and for each other value that is rounded.
        output_sqnr: signal to quantization noise ratio of the model's outputs, in dB.
        float_operations: what stays in float, and why.
        metric: the name of what `only_quantized` and `only_float` of the layers are measured in.
        in_float: the metric with nothing quantized; `None` where sensitivities were not asked for.
        config: the recipe of the model; `None` of a file.
    """

    layers: tuple[LayerAnalysis, ...]
    output_sqnr: float
    float_operations: tuple[FloatOperation, ...]
    metric: str
    in_float: float | None = None
    config: QATConfig | None = None

    def worst(self, n: int = 5) -> tuple[LayerAnalysis, ...]:
        """The `n` layers that cost most: those with the severest findings, and among these the noisiest first."""
        ranked = sorted(self.layers, key=lambda layer: (layer.severity, layer.added_noise))
        return tuple(ranked[:n])

    @property
    def table(self) -> str:
        """All layers as text, one line each, under a header.

        SQNR is against the float model, `weight` and `own` what the layer's weight and its result alone lose by
        rounding, `only it` the metric with nothing else quantized, `all but it` with nothing else in float.
        """
        return text_table(self.layers)

    def remedies(self, n: int = 5) -> str:
        """The findings on the worst `n` layers, each with what to do."""
        lines = []
        for layer in self.worst(n):
            for finding in layer.findings:
                lines += [f"{layer.path}: {finding.what}.", f"    {finding.remedy}."]
        return "\n".join(lines) or "Nothing is conspicuous."

    def __str__(self) -> str:
        lines = [self.table, "", f"Outputs: {decibels(self.output_sqnr)} dB against the float model.", ""]
        for reason, operations in by_reason(self.float_operations).items():
            lines.append(f"In float, {reason}: {', '.join(operations)}")
        return "\n".join([*lines, self.remedies()])

    def plot(self, path: str | Path) -> Path:
        """Draw SQNR and sensitivity by layer into a PNG, PDF or SVG file, by the ending of its name.

        Raises:
            AnalysisError: matplotlib is missing.
        """
        return save_figure(self.layers, self.metric, Path(path))

    def to_html(self, path: str | Path) -> Path:
        """Write a page that needs nothing else: the figure, the findings, and the table.

        Raises:
            AnalysisError: matplotlib is missing.
        """
        with whole_file(Path(path)) as file:
            file.write_text(document("Quantization, layer by layer", self.sections(self.figures())), encoding="utf-8")
        return Path(path)

    def figures(self) -> dict[str, Any]:
        """By name: `layers`, a bar for each, and `histograms` of the worst ones if they have any; matplotlib's.

        Raises:
            AnalysisError: matplotlib is missing.
        """
        drawn = {"layers": draw(self.layers, self.metric), "histograms": draw_histograms(self.worst())}
        return {name: figure for name, figure in drawn.items() if figure is not None}

    def sections(self, figures: Mapping[str, Any]) -> list[str]:
        """The page's parts, as HTML, for a page of one's own.

        Args:
            figures: what `figures` returns.
        """
        return sections(self.layers, self.worst(), figures, self.output_sqnr, self.float_operations)
