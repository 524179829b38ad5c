"""`hf-qat analyze`: where quantization costs accuracy, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_qat.cli.arguments import DataArguments, ModelArguments, QATArguments
from hf_qat.cli.evaluate import checkpoint_of
from hf_qat.cli.parsing import count, parse, parser_of


if TYPE_CHECKING:
    from hf_qat.cli.session import Session
    from hf_qat.model.analysis.analysis import Analysis


DESCRIPTION = (
    "Say of each layer how far it is from the float model, how much it alone costs, and what to do. Give a float "
    "model, which is quantized by calibration for --target first; or an int8 checkpoint, which is compared with "
    "--reference, or with its own codes in float arithmetic; or an ONNX file of ours, which is compared with a float "
    "ONNX file as --reference, or with itself without rounding, on ONNX Runtime. Images need no labels. For example: "
    "hf-qat analyze my/float-model --dataset_name photos/ --target AM68A --html analysis.html; or hf-qat analyze "
    "out/export/onnx/model.onnx --reference float.onnx --dataset_name photos/"
)


def main(argv: Sequence[str]) -> None:
    """Analyze, and print the table and the remedies.

    Args:
        argv: what follows `hf-qat analyze`.

    Raises:
        HfQatError: options that cannot be honoured.
        SystemExit: wrong options, or `--help`.
    """
    parser = parser_of("analyze", DESCRIPTION, ModelArguments, DataArguments, QATArguments)
    parser.add_argument("--reference", help="The float model, or ONNX file, to compare with.")
    parser.add_argument("--html", type=Path, help="Also write a page with figure and table.")
    parser.add_argument("--plot", type=Path, help="Also draw a figure: PNG, PDF or SVG.")
    parser.add_argument("--batch_size", type=count, default=8, help="Images at a time.")
    parser.add_argument("--num_batches", type=count, default=4, help="Batches to compare on.")
    named_first = argv and not argv[0].startswith("-")
    model, data, qat, other = parse(parser, ["--model_name_or_path", *argv] if named_first else argv)
    _require_figures(other)
    is_file = model.model_name_or_path.endswith(".onnx")
    found = _analyze_file(model, data, other) if is_file else _analyze(model, data, qat, other)
    print(found)
    if other.html is not None:
        print(f"Written: {found.to_html(other.html)}")
    if other.plot is not None:
        print(f"Written: {found.plot(other.plot)}")


def _require_figures(other: Any) -> None:
    """Raise `AnalysisError` for figures that cannot be drawn, before the time for an analysis is spent."""
    if other.html is None and other.plot is None:
        return
    from hf_qat.model.analysis.figure import require_ending, require_matplotlib

    require_matplotlib()
    if other.plot is not None:
        require_ending(other.plot)


def _analyze(model: ModelArguments, data: DataArguments, qat: QATArguments, other: Any) -> Analysis:
    """Load, calibrate what is float, and compare."""
    from hf_qat.cli.session import open_session  # so that --help need not wait for PyTorch
    from hf_qat.model.analysis.analyze import analyze
    from hf_qat.model.calibration import calibrate
    from hf_qat.model.prepare import prepare_qat
    from hf_qat.model.state import state_of

    session = open_session(model, data, labelled=False)
    batches = list(_batches(session, other.batch_size, max(other.num_batches, qat.calibration_batches)))
    reference = _reference(session, model, other.reference)
    if state_of(session.model) is None:
        calibrate(prepare_qat(session.model.eval(), qat.to_config(), batches[0]), batches, qat.calibration_batches)
    return analyze(session.model, batches, reference, num_batches=other.num_batches)


def _analyze_file(model: ModelArguments, data: DataArguments, other: Any) -> Analysis:
    """Compare an ONNX file; the processor of its images is that of the checkpoint that it belongs to."""
    from hf_qat.cli.session import open_session
    from hf_qat.export.onnx_analysis import analyze_onnx

    file = Path(model.model_name_or_path)
    session = open_session(replace(model, model_name_or_path=str(checkpoint_of(file))), data, labelled=False)
    batches = _batches(session, other.batch_size, other.num_batches)
    return analyze_onnx(file, batches, other.reference, num_batches=other.num_batches)


def _reference(session: Session, model: ModelArguments, name: str | None) -> Any:
    """The float model to compare with; of an int8 checkpoint without one, its own codes as float numbers."""
    from hf_qat.cli.session import load_model
    from hf_qat.model.state import state_of

    if name is not None:
        return load_model(replace(model, model_name_or_path=name), session.task)
    if state_of(session.model) is None:
        return copy.deepcopy(session.model)
    return copy.deepcopy(session.model).dequantize()


def _batches(session: Session, size: int, count: int) -> Iterator[dict[str, Any]]:
    """The first images of the train set, without labels."""
    for start in range(0, min(count * size, len(session.train)), size):
        yield session.inputs(range(start, min(start + size, len(session.train))))
