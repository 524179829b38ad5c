"""An analysis as one HTML page that needs no network: readable on a phone, and in greyscale."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hf_qat.model.analysis.layer import LayerAnalysis
from hf_qat.model.analysis.table import HEADER, cells, decibels
from hf_qat.model.in_float import FloatOperation, by_reason


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; color: #222; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem }
.wide { overflow-x: auto } svg { max-width: 100%; height: auto; min-width: 38rem }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem }
dt { font-weight: 600; overflow-wrap: anywhere } dd { margin: 0 0 .8rem 1rem }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page: `parts` are HTML already, `title` is text."""
    head = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"])


def sections(
    layers: Sequence[LayerAnalysis],
    worst: Sequence[LayerAnalysis],
    figures: Mapping[str, Any],
    output_sqnr: float,
    float_operations: Sequence[FloatOperation],
) -> list[str]:
    """Findings, figures and table as parts of a page; names of layers, which a stranger may have chosen, are escaped.

    Args:
        layers: all.
        worst: those whose findings come first.
        figures: `layers`, and `histograms` if there are any, as `Analysis.figures` draws them.
        output_sqnr: of the model, in dB.
        float_operations: what stays in float.
    """
    return [
        f"<p>{len(layers)} places; the outputs keep {decibels(output_sqnr)} dB against the float model. 6 dB are "
        "about one bit.</p>",
        "<h2>What to look at first</h2>",
        *_findings(worst),
        *_histograms(figures.get("histograms")),
        "<h2>All layers</h2>",
        '<div class="wide" id="figure">' + as_svg(figures["layers"]) + "</div>",
        f'<div class="wide"><table id="layers">{table_row(HEADER, "th")}',
        *(table_row(cells(layer), "td") for layer in layers),
        "</table></div>",
        *_in_float(float_operations),
    ]


def _findings(layers: Sequence[LayerAnalysis]) -> list[str]:
    found = [(layer, finding) for layer in layers for finding in layer.findings]
    if not found:
        return ["<p>Nothing is conspicuous.</p>"]
    entries = [
        f"<dt>{escape(layer.path)}</dt><dd>{escape(finding.what)}.<br>{escape(finding.remedy)}.</dd>"
        for layer, finding in found
    ]
    return ['<dl id="findings">', *entries, "</dl>"]


def _histograms(figure: Any | None) -> list[str]:
    if figure is None:
        return []
    return [
        "<h3>Their numbers, and the codes for them</h3>",
        "<p>Black ticks are the numbers that codes stand for; grey is what none reaches. Counts are logarithmic.</p>",
        f'<div class="wide" id="histograms">{as_svg(figure)}</div>',
    ]


def _in_float(operations: Sequence[FloatOperation]) -> list[str]:
    reasons = by_reason(operations).items()
    lines = [f"<li>{escape(', '.join(names))}: {escape(reason)}</li>" for reason, names in reasons]
    return ["<h2>What stays in float</h2>", "<ul>", *lines, "</ul>"] if lines else []


def table_row(values: Sequence[str], tag: str) -> str:
    """A row of a table; `tag` is `th` or `td`."""
    return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"


def as_svg(figure: Any) -> str:
    """A matplotlib figure, to stand in a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
