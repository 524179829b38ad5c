"""The demo's results: one row a model, as a table to read and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


#: Below this loss, in points, "the share of it that training won back" says nothing.
TELLING_LOSS = 1.0


@dataclass(frozen=True)
class Row:
    """One model. Accuracies are percentages of the test set.

    Attributes:
        target: name of the case; `"float"` for the float model.
        stage: `"float"`, `"calibrated"` or `"QAT"`.
        trainer: accuracy by `Trainer.evaluate`.
        converted: that of the converted model, in torch; `None` for the float model.
        plain, optimized: that of the file on ONNX Runtime, with optimizations off and on.
        agreement: percentage of the test set in which ONNX Runtime and the converted model see the same digit, the
            lower one of both settings.
        size: of the file, in bytes.
        file: the ONNX file.
    """

    target: str
    stage: str
    trainer: float
    converted: float | None
    plain: float
    optimized: float
    agreement: float | None
    size: int
    file: str


HEADER = (
    "Accuracy on the test set     |      in torch       |  on ONNX Runtime   |  same  |  file",
    "in %                         |  Trainer  converted |   plain  optimized |  class |   MB   name",
)


def table(rows: Iterable[Row]) -> str:
    """The rows as text, under a header."""
    return "\n".join([*HEADER, "-" * len(HEADER[1]), *map(_line, rows)])


def _line(row: Row) -> str:
    name = row.target if row.stage == row.target else f"{row.target}, {row.stage}"
    torch = f"{row.trainer:8.2f}  {_figure(row.converted):>9}"
    runtime = f"{row.plain:7.2f}  {row.optimized:9.2f}"
    return f"{name:<28} | {torch} | {runtime} | {_figure(row.agreement):>6} | {row.size / 1e6:4.2f}  {row.file}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def summary(rows: Sequence[Row]) -> str:
    """A sentence on each target: what calibration lost, and what training won back.

    Args:
        rows: the float model; then for each target the calibrated model and the trained one.
    """
    pairs = zip(rows[1::2], rows[2::2], strict=True)
    return "\n".join(_sentence(rows[0].trainer, *pair) for pair in pairs)


def _sentence(reference: float, calibrated: Row, trained: Row) -> str:
    lost, left = reference - calibrated.trainer, reference - trained.trainer
    if lost < TELLING_LOSS:
        return f"{trained.target}: calibration is good enough ({-lost:+.2f} points; after training, {-left:+.2f})."
    if left <= 0:
        return f"{trained.target}: calibration lost {lost:.2f} points, training won all of them back ({-left:+.2f})."
    return f"{trained.target}: calibration lost {lost:.2f} points, training won {1 - left / lost:.0%} of them back."


def save(rows: Iterable[Row], seed: int, path: Path) -> None:
    """Write seed and rows as JSON."""
    path.write_text(json.dumps({"seed": seed, "rows": [asdict(row) for row in rows]}, indent=2) + "\n", "utf-8")
