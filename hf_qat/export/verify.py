"""Verification: the converted model in torch against its file on ONNX Runtime, with optimizations off and on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import ExportError
from hf_qat.export.float_operators import count_quantize_nodes, float_operators, output_steps
from hf_qat.export.io_names import bind, input_tensors, named_outputs
from hf_qat.export.onnx_graph import opset_of
from hf_qat.export.report import Agreement, ExportReport
from hf_qat.graph.capture.inputs import Inputs, as_call, device_of
from hf_qat.model.in_float import float_operations
from hf_qat.model.state import require_stage


#: Where classes lie, by the number of axes: (N, C), (N, queries, C), (N, C, H, W).
CLASS_AXES = {2: 1, 3: 2, 4: 1}

#: What ONNX Runtime 1.32 says where its optimizer makes signed codes unsigned and forgets the `output_dtype` of a
#: `QuantizeLinear` that it has inserted itself, from opset 21 on. It can be told to leave the codes signed.
SIGNED_CODES_BUG = "output_dtype INT8 does not match y_zero_point type UINT8"

#: What rounding alone may come to: the largest `Agreement.relative_error` with which a file is taken for the model.
LARGEST_ERROR = 0.5

#: Differences of outputs up to so many steps are none: a step, and what float32 makes of it.
WITHIN_STEP = 1.01

#: Names of outputs that hold a score for each class.
SCORES = frozenset({"logits", "output"})


def verify_onnx(model: nn.Module, path: str | Path, batches: Iterable[Inputs]) -> ExportReport:
    """Run the file on ONNX Runtime and the model in torch, on the same inputs.

    Args:
        model: the converted model that the file was exported from.
        path: the file.
        batches: tensors, tuples or dicts, as forward takes them, batch first, of any size; labels are left out.

    Raises:
        StageError: the model is not converted.
        ExportError: ONNX Runtime is missing, does not load the file, or there is nothing to compare.
    """
    require_stage(model, Stage.CONVERTED, "verify")
    require_onnxruntime()
    path = Path(path)
    file = _load(path)
    sessions = [Session(path, optimized=False), Session(path, optimized=True)]
    comparisons = [_Comparison(output_steps(file)) for _ in sessions]
    samples = 0
    for batch in batches:
        inputs, expected = _run_torch(model, batch)
        samples += len(inputs[0])
        for session, comparison in zip(sessions, comparisons, strict=True):
            results = session.run(inputs)
            if session.batch_size is None or _is_row_by_row(expected, results, len(inputs[0])):
                comparison.add(expected, results)
                continue
            for part in _parts(batch, session.batch_size):
                inputs_of_part, expected_of_part = _run_torch(model, part)
                comparison.add(expected_of_part, session.run(inputs_of_part))
    if not samples:
        raise ExportError(f"there is nothing to compare {path} on: `batches` is empty.")
    plain, optimized = (comparison.result() for comparison in comparisons)
    report = describe(model, path, file)
    return replace(report, samples=samples, plain=plain, optimized=optimized, session_options=sessions[1].options)


def require_agreement(report: ExportReport) -> None:
    """Raise `ExportError` if ONNX Runtime, in either setting, computes something else than torch does."""
    for setting, agreement in (("off", report.plain), ("on", report.optimized)):
        if agreement is not None and not agreement.relative_error <= LARGEST_ERROR:
            raise ExportError(
                f"ONNX Runtime (optimizations {setting}) computes something else from the file than torch from the "
                f"model: outputs differ by {agreement.relative_error:.0%} of their size, at most {LARGEST_ERROR:.0%} "
                "may come of rounding. verify_onnx compares a file on more inputs; export_onnx(..., verify=False) "
                "writes it nevertheless."
            )


def describe(model: nn.Module, path: Path, file: onnx.ModelProto) -> ExportReport:
    """What the file of a converted model holds, with nothing compared yet."""
    return ExportReport(
        path=path,
        size=path.stat().st_size,
        opset=opset_of(file),
        num_quantize_nodes=count_quantize_nodes(file),
        float_ops=float_operators(file),
        float_operations=tuple(float_operations(model)),
    )


def require_onnxruntime() -> None:
    """Raise `ExportError` if ONNX Runtime is not installed."""
    if find_spec("onnxruntime") is None:
        raise ExportError('verification runs on ONNX Runtime, which is not installed: pip install "hf_qat[export]".')


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:
        raise ExportError(f"{path} cannot be read as an ONNX file: {error}") from error


@torch.no_grad()
def _run_torch(model: nn.Module, batch: Inputs) -> tuple[list[np.ndarray], list[tuple[str, np.ndarray]]]:
    device = device_of(model)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), as_call(batch))
    inputs = [tensor.cpu().numpy() for tensor in input_tensors(bind(model, args, kwargs))]
    outputs = [(name, tensor.cpu().numpy()) for name, tensor in named_outputs(model(*args, **kwargs))]
    return inputs, outputs


def _is_row_by_row(expected: Sequence[tuple[str, np.ndarray]], results: Sequence[np.ndarray], rows: int) -> bool:
    """Whether each output is a row for each image, so that those of several runs can be put together."""
    pairs = zip(expected, results, strict=True)
    return all(wanted.ndim > 0 and len(wanted) == rows and wanted.shape == got.shape for (_, wanted), got in pairs)


def _parts(batch: Inputs, size: int) -> Iterator[Inputs]:
    """The batch, `size` rows at a time; at the end the last one is repeated."""
    args, kwargs = as_call(batch)
    rows = max(len(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    for start in range(0, rows, size):
        index = torch.arange(start, start + size).clamp(max=rows - 1)
        yield torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda x, index=index: x.index_select(0, index.to(x.device)), kwargs or args
        )


class Session:
    """One file loaded into ONNX Runtime, which takes batches of any size even where the file has a fixed one.

    Attributes:
        optimized: whether ONNX Runtime's optimizations are on.
        options: session options that ONNX Runtime needs to load the file.

    Raises:
        ExportError: ONNX Runtime does not load the file.
    """

    def __init__(self, path: Path, optimized: bool) -> None:
        self.optimized, self._path = optimized, path
        self.options: dict[str, str] = {}
        try:
            self._session = _start(path, optimized, self.options)
        except Exception as error:
            if SIGNED_CODES_BUG not in str(error):
                setting = "on" if optimized else "off"
                raise ExportError(f"ONNX Runtime (optimizations {setting}) does not load {path}: {error}") from error
            self.options = {"session.qdqisint8allowed": "1"}
            self._session = _start(path, optimized, self.options)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return [value.name for value in self._session.get_inputs()]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        return [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All outputs, in order, for inputs in order, (N, …) each.

        Raises:
            ExportError: the inputs do not fit the file, or ONNX Runtime fails to compute it.
        """
        size = self.batch_size
        if size is None or all(len(x) == size for x in inputs):
            return self._run(inputs)
        if len({len(x) for x in inputs}) > 1:
            raise ExportError(
                f"inputs of {', '.join(str(len(x)) for x in inputs)} rows do not fit a file for a batch of {size}: "
                "the first axis of each is taken for the batch. export_onnx(..., verify=False) writes it unverified."
            )
        starts = range(0, len(inputs[0]), size)
        parts = [self._run([_rows(x, start, size) for x in inputs]) for start in starts]
        return [_joined(outputs, len(inputs[0])) for outputs in zip(*parts, strict=True)]

    def _run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        names = self.inputs
        if len(names) != len(inputs):
            raise ExportError(f"the file takes {len(names)} inputs ({', '.join(names)}), the batch has {len(inputs)}.")
        try:
            results: list[np.ndarray] = self._session.run(None, dict(zip(names, inputs, strict=True)))
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot compute {self._path} on these inputs: {error}") from error
        return results

    @property
    def batch_size(self) -> int | None:
        """The batch that the file is for; `None` if it takes any."""
        size = self._session.get_inputs()[0].shape[0]
        return size if isinstance(size, int) else None


def _start(path: Path, optimized: bool, entries: dict[str, str]) -> Any:
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3  # errors only
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _rows(x: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` rows from `start` on; the last one is repeated where there are fewer."""
    rows = x[start : start + count]
    return np.concatenate([rows, *[rows[-1:]] * (count - len(rows))])


def _joined(outputs: Sequence[np.ndarray], count: int) -> np.ndarray:
    """One output of several batches: its first `count` rows; of a single number, such as a loss, the mean."""
    whole: np.ndarray = (
        np.concatenate(outputs)[:count] if outputs[0].ndim else np.mean(outputs, dtype=outputs[0].dtype)
    )
    return whole


@dataclass
class _Comparison:
    """Differences, collected batch by batch; `steps` are the quantization steps of the outputs."""

    steps: list[float | None]
    agreeing: int = 0
    predictions: int = 0
    lsb: float | None = None
    difference: float = 0.0
    errors: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.errors, self.energies = [0.0] * len(self.steps), [0.0] * len(self.steps)

    def add(self, expected: Sequence[tuple[str, np.ndarray]], results: Sequence[np.ndarray]) -> None:
        for k, ((name, wanted), got, step) in enumerate(zip(expected, results, self.steps, strict=True)):
            differences = _differences(wanted, got)
            largest = float(differences.max(initial=0.0))
            self.difference = max(self.difference, largest)
            if step is not None:
                self.lsb = max(self.lsb or 0.0, largest / step)
            counted = differences[differences > (step or 0.0) * WITHIN_STEP]
            self.errors[k] += float(np.square(counted).sum())
            self.energies[k] += float(np.square(wanted[np.isfinite(wanted)].astype(np.float64)).sum())
            self._compare_classes(name, wanted, got)

    def _compare_classes(self, name: str, wanted: np.ndarray, got: np.ndarray) -> None:
        axis = CLASS_AXES.get(wanted.ndim) if name in SCORES else None
        if axis is None or wanted.shape[axis] <= 1:
            return
        known = ~np.isnan(wanted).any(axis) & ~np.isnan(got).any(axis)
        same = (wanted.argmax(axis) == got.argmax(axis)) & known
        self.agreeing += int(same.sum())
        self.predictions += same.size

    def result(self) -> Agreement:
        share = self.agreeing / self.predictions if self.predictions else None
        relative = max(map(_relative, self.errors, self.energies), default=0.0)
        lsb = None if self.lsb is None or math.isinf(self.lsb) else round(self.lsb)
        return Agreement(share, lsb, self.difference, relative)


def _differences(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Magnitudes; 0 between infinities of one sign, infinite where there is NaN."""
    with np.errstate(invalid="ignore"):
        differences = np.asarray(np.abs(wanted.astype(np.float64) - got))
    differences[wanted == got] = 0.0
    return np.where(np.isnan(differences), np.inf, differences)


def _relative(error: float, energy: float) -> float:
    if error == 0.0:
        return 0.0
    return math.sqrt(error / energy) if energy else math.inf
