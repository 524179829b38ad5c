"""The rows as text, means and spreads over seeds, and as a plot of points against steps of training."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from hf_qat.files.atomic import whole_file
from tests.benchmarks.accuracy.rows import Row


RESULTS = Path(__file__).parent / "results"

Key = tuple[str, str, str]

#: A dataclass of rows.
Measured = TypeVar("Measured", bound=Any)

#: What a line of the plot is made of, and how a target's looks.
PLOTTED = ("calibrated", "QAT, 1 epoch", "QAT, 3 epochs")
STYLES = {"int8": "C0o-", "AM68A": "C1s--", "TDA4VM": "C2^-.", "w4a8": "C3D:", "w4a4": "C4v-"}

#: Panels beside each other.
PANELS = 4


def read(directory: Path = RESULTS) -> list[Row]:
    """All rows measured so far."""
    return rows_in(directory, Row)


def rows_in(directory: Path, kind: type[Measured]) -> list[Measured]:
    """Those of all files of a directory."""
    return [kind(**row) for file in sorted(directory.glob("*.json")) for row in json.loads(file.read_text())]


def add(row: Row, directory: Path = RESULTS) -> None:
    """Write a row to the file of its net, in place of one that was measured before."""
    add_to(directory / f"{row.net}.json", row, lambda one: (*key(one), one.seed))


def add_to(file: Path, row: Measured, question: Callable[[Measured], tuple[Any, ...]]) -> None:
    """Write a row among those of its file, ordered by what they answer, in place of one that did so before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [type(row)(**old) for old in json.loads(file.read_text())] if file.is_file() else []
    kept = [old for old in rows if question(old) != question(row)]
    with whole_file(file) as temporary:
        ordered = sorted([*kept, row], key=question)
        temporary.write_text(json.dumps([asdict(one) for one in ordered], indent=1) + "\n")


def key(row: Row) -> Key:
    """What its seeds share."""
    return row.net, row.target, row.method


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The seeds of each row."""
    groups: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def table(rows: Iterable[Row]) -> str:
    """Points on ONNX Runtime, with its optimizations, against float; `apart` is the most that any two ways differ."""
    lines = [f"{'':<12}{'':<8}{'':<60}{'seeds':>6}{'float':>8}{'int':>8}{'±':>6}{'change':>8}{'±':>6}{'apart':>7}"]
    for (net, target, method), group in grouped(rows).items():
        figures = [mean(row.in_float for row in group), mean(row.optimized for row in group)]
        spreads = [spread([row.optimized for row in group]), spread(changes(group))]
        apart = max(max(ways(row)) - min(ways(row)) for row in group)
        lines.append(
            f"{net:<12}{target:<8}{method:<60}{len(group):>6}{figures[0]:>8.2f}{figures[1]:>8.2f}{spreads[0]:>6.2f}"
            f"{mean(changes(group)):>+8.2f}{spreads[1]:>6.2f}{apart:>7.2f}"
        )
    return "\n".join(lines)


def changes(group: Iterable[Row]) -> list[float]:
    """Points gained against float, of each seed."""
    return [row.optimized - row.in_float for row in group]


def ways(row: Row) -> tuple[float, float, float, float]:
    """Points of the same quantized net, by all who compute it."""
    return row.trainer, row.converted, row.plain, row.optimized


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def plot(rows: Iterable[Row], file: Path) -> None:
    """Points lost against steps of QAT, a panel for each net, a line for each target, bars for the spread of seeds."""
    from matplotlib import pyplot

    groups = grouped(row for row in rows if row.method in PLOTTED)
    nets = list(dict.fromkeys(net for net, _, _ in groups))
    lines = -(-len(nets) // PANELS)
    size = (3.4 * min(len(nets), PANELS), 3.2 * lines)
    figure, panels = pyplot.subplots(lines, min(len(nets), PANELS), figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(nets) :]:
        panel.set_axis_off()
    for panel, net in zip(panels.flat, nets, strict=False):
        for target, style in STYLES.items():
            line = sorted(
                (mean(row.steps for row in group), mean(changes(group)), spread(changes(group)))
                for (of, at, _), group in groups.items()
                if (of, at) == (net, target)
            )
            if line:
                panel.errorbar(*zip(*line, strict=True), fmt=style, label=target, capsize=2)
        panel.set(title=net, xlabel="steps of QAT")
        panel.axhline(0, color="black", linewidth=0.8)
        panel.legend()
    panels[0][0].set_ylabel("points against float, ONNX Runtime")
    figure.savefig(file)
    pyplot.close(figure)
