"""Verification: the converted model in torch against its file on ONNX Runtime, with optimizations off and on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.errors import ExportError
from hf_qat.export.comparison import Comparison
from hf_qat.export.float_operators import count_quantize_nodes, float_operators, output_steps
from hf_qat.export.io_names import bind, input_tensors, named_outputs
from hf_qat.export.onnx_graph import opset_of
from hf_qat.export.onnx_session import open_session
from hf_qat.export.report import PERTURBATION, ExportReport
from hf_qat.graph.capture.inputs import Inputs, as_call, device_of
from hf_qat.model.batches import types_told
from hf_qat.model.eager import in_eager_mode, uncompiled
from hf_qat.model.in_float import float_operations
from hf_qat.model.state import require_stage


#: What ONNX Runtime 1.32 says where its optimizer makes signed codes unsigned and forgets the `output_dtype` of a
#: `QuantizeLinear` that it has inserted itself, from opset 21 on. It can be told to leave the codes signed.
SIGNED_CODES_BUG = "output_dtype INT8 does not match y_zero_point type UINT8"

#: What rounding alone may come to: the largest `Agreement.relative_error` with which a file is taken for the model.
LARGEST_ERROR = 0.5

#: So many times what its own inputs, changed by `PERTURBATION`, make of a model its file may differ from it.
TIMES_ITSELF = 3

#: So many changes are tried; the largest effect counts.
CHANGES = 8


@in_eager_mode()
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
    model = uncompiled(model)
    require_stage(model, Stage.CONVERTED, "verify")
    require_onnxruntime()
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise ExportError("`batches` is one batch: give an iterable of batches, such as a data loader or [batch].")
    path = Path(path)
    file = _load(path)
    sessions = [Session(path, optimized=False), Session(path, optimized=True)]
    steps = output_steps(file)
    comparisons = [Comparison(steps) for _ in sessions]
    samples, first = 0, None
    for batch in batches:
        first = batch if first is None else first
        inputs, expected = _run_torch(model, batch)
        rows = _rows_in(inputs)
        if not rows:
            continue
        samples += rows
        for session, comparison in zip(sessions, comparisons, strict=True):
            size = session.batch_size
            results = _together(session, inputs)
            if results is not None and (size is None or _is_row_by_row(expected, results, rows)):
                comparison.add(expected, results)
                continue
            for part in _parts(batch, size or rows):
                inputs_of_part, expected_of_part = _run_torch(model, part)
                comparison.add(expected_of_part, session.run(inputs_of_part))
    if not samples:
        raise ExportError(f"there is nothing to compare {path} on: `batches` is empty.")
    plain, optimized = (comparison.result() for comparison in comparisons)
    report = replace(describe(model, path, file), samples=samples, plain=plain, optimized=optimized)
    if first is not None and not max(plain.relative_error, optimized.relative_error) <= LARGEST_ERROR:
        report = replace(report, sensitivity=sensitivity(model, first, steps))
    return replace(report, session_options=sessions[1].options)


def require_agreement(report: ExportReport) -> None:
    """Raise `ExportError` if ONNX Runtime, in either setting, computes something else than torch does.

    Where a detector chooses among nearly equal scores, one that is chosen otherwise changes the order of all that come
    after it. As much as the model does so by itself, for inputs that are nearly the same, the file may.
    """
    allowed = max(LARGEST_ERROR, TIMES_ITSELF * report.sensitivity)
    for setting, agreement in (("off", report.plain), ("on", report.optimized)):
        if agreement is not None and not agreement.relative_error <= allowed:
            raise ExportError(
                f"ONNX Runtime (optimizations {setting}) computes something else from the file than torch from the "
                f"model: outputs differ by {agreement.relative_error:.0%} of their size, at most {allowed:.0%} "
                "may come of rounding. verify_onnx compares a file on more inputs; export_onnx(..., verify=False) "
                "writes it nevertheless."
            )


def sensitivity(model: nn.Module, batch: Inputs, steps: Sequence[float | None]) -> float:
    """What small changes of the inputs make of the outputs in torch: the largest `Agreement.relative_error`.

    Args:
        model: converted.
        batch: as `verify_onnx` takes it.
        steps: of the outputs' quantizers, `None` where there is none.
    """
    generator = torch.Generator().manual_seed(0)

    def changed(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
        return x * (1 + PERTURBATION * noise).to(x.dtype) if x.is_floating_point() else x

    _, expected = _run_torch(model, batch)
    args, kwargs = as_call(batch)
    errors = []
    for _ in range(CHANGES):
        comparison = Comparison(list(steps))
        _, found = _run_torch(model, torch.utils._pytree.tree_map_only(torch.Tensor, changed, kwargs or args))
        with contextlib.suppress(ExportError):  # another number of what is found, which nothing can be compared with
            comparison.add(expected, [values for _, values in found])
            errors.append(comparison.result().relative_error)
    return max(filter(math.isfinite, errors), default=0.0)


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
    inputs = input_tensors(bind(model, args, kwargs))
    with types_told(model, inputs, "inputs are", ExportError):
        result = model(*args, **kwargs)
    outputs = [(name, tensor.cpu().numpy()) for name, tensor in named_outputs(result)]
    return [tensor.cpu().numpy() for tensor in inputs], outputs


class _UnevenError(ExportError):
    """Rows that cannot be put together, as there is more of one than of another."""


def _together(session: Session, inputs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """All outputs of all rows; `None` where one has more than another, such as key points."""
    try:
        return session.run(inputs)
    except _UnevenError:
        return None


def _is_row_by_row(expected: Sequence[tuple[str, np.ndarray]], results: Sequence[np.ndarray], rows: int) -> bool:
    """Whether each output is a row for each image, so that those of several runs can be put together."""
    pairs = zip(expected, results, strict=True)
    return all(wanted.ndim > 0 and len(wanted) == rows and wanted.shape == got.shape for (_, wanted), got in pairs)


def _parts(batch: Inputs, size: int) -> Iterator[Inputs]:
    """The batch, `size` rows at a time; at the end the last one is repeated."""
    args, kwargs = as_call(batch)
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    rows = max(len(x) for x in tensors if x.dim())

    def part(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, index.to(x.device)) if x.dim() else x

    for start in range(0, rows, size):
        index = torch.arange(start, start + size).clamp(max=rows - 1)
        yield torch.utils._pytree.tree_map_only(torch.Tensor, partial(part, index=index), kwargs or args)


def _rows_in(inputs: Sequence[np.ndarray]) -> int:
    """The batch of some inputs, of which a single number has none; 1 if none has."""
    return next((len(x) for x in inputs if x.ndim), 1)


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
            self._session = self._open()
        except Exception as error:
            if SIGNED_CODES_BUG not in str(error):
                setting = "on" if optimized else "off"
                raise ExportError(f"ONNX Runtime (optimizations {setting}) does not load {path}: {error}") from error
            self.options = {"session.qdqisint8allowed": "1"}
            self._session = self._open()

    def _open(self) -> Any:
        threads = torch.get_num_threads()  # as many as torch takes, which the user has a say in
        return open_session(str(self._path), self.optimized, threads, self.options)

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
        size, rows = self.batch_size, _rows_in(inputs)
        counts = [len(x) for x in inputs if x.ndim]
        if size is None or all(count == size for count in counts):
            return self._run(inputs)
        if len(set(counts)) > 1:
            raise ExportError(
                f"inputs of {', '.join(map(str, counts))} rows do not fit a file for a batch of {size}: "
                "the first axis of each is taken for the batch. export_onnx(..., verify=False) writes it unverified."
            )
        starts = range(0, rows, size)
        parts = [self._run([_rows(x, start, size) if x.ndim else x for x in inputs]) for start in starts]
        return [_joined(outputs, rows) for outputs in zip(*parts, strict=True)]

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
        """The batch that the file is for; `None` if it takes any, or numbers alone."""
        size = next((value.shape[0] for value in self._session.get_inputs() if value.shape), None)
        return size if isinstance(size, int) else None


def _rows(x: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` rows from `start` on; the last one is repeated where there are fewer."""
    rows = x[start : start + count]
    return np.concatenate([rows, *[rows[-1:]] * (count - len(rows))])


def _joined(outputs: Sequence[np.ndarray], count: int) -> np.ndarray:
    """One output of several batches: its first `count` rows; of a single number, such as a loss, the mean."""
    if len({output.shape[1:] for output in outputs}) > 1:
        shapes = ", ".join(str(shape) for shape in dict.fromkeys(output.shape for output in outputs))
        raise _UnevenError(
            f"outputs of the shapes {shapes} cannot be put together: how much there is depends on the image, and the "
            "file takes one at a time. Give it one."
        )
    whole: np.ndarray = (
        np.concatenate(outputs)[:count] if outputs[0].ndim else np.mean(outputs, dtype=outputs[0].dtype)
    )
    return whole
