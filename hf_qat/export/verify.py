"""Verification: the converted model in torch against its file on ONNX Runtime, with optimizations off and on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
            comparison.add(expected, session.run(inputs))
    if not samples:
        raise ExportError(f"there is nothing to compare {path} on: `batches` is empty.")
    plain, optimized = (comparison.result() for comparison in comparisons)
    report = describe(model, path, file)
    return replace(report, samples=samples, plain=plain, optimized=optimized, session_options=sessions[1].options)


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


class Session:
    """One file loaded into ONNX Runtime, which takes batches of any size even where the file has a fixed one.

    Attributes:
        options: session options that ONNX Runtime needs to load the file.

    Raises:
        ExportError: ONNX Runtime does not load the file.
    """

    def __init__(self, path: Path, optimized: bool) -> None:
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
        """All outputs, in order, for inputs in order, (N, …) each."""
        size = self._batch_size()
        if size is None:
            return self._run(inputs)
        starts = range(0, len(inputs[0]), size)
        parts = [self._run([_rows(x, start, size) for x in inputs]) for start in starts]
        return [np.concatenate(outputs)[: len(inputs[0])] for outputs in zip(*parts, strict=True)]

    def _run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        names = self.inputs
        if len(names) != len(inputs):
            raise ExportError(f"the file takes {len(names)} inputs ({', '.join(names)}), the batch has {len(inputs)}.")
        results: list[np.ndarray] = self._session.run(None, dict(zip(names, inputs, strict=True)))
        return results

    def _batch_size(self) -> int | None:
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


def _largest_difference(name: str, wanted: np.ndarray, got: np.ndarray) -> float:
    """Of two arrays of one shape; infinities that are equal do not differ.

    Raises:
        ExportError: one of them has NaN, or an infinity where the other one has a number.
    """
    differences = np.abs(np.subtract(wanted, got, out=np.zeros_like(wanted), where=wanted != got))
    largest = float(differences.max(initial=0.0))
    if not np.isfinite(largest):
        raise ExportError(
            f"the output {name!r} is not finite, in torch or on ONNX Runtime: the weights or the inputs hold NaN or "
            "infinities, or training has diverged. Go back to an earlier checkpoint, and lower the learning rate."
        )
    return largest


@dataclass
class _Comparison:
    """Differences, collected batch by batch; `steps` are the quantization steps of the outputs."""

    steps: list[float | None]
    agreeing: int = 0
    predictions: int = 0
    lsb: int | None = None
    difference: float = 0.0

    def add(self, expected: Sequence[tuple[str, np.ndarray]], results: Sequence[np.ndarray]) -> None:
        for (name, wanted), got, step in zip(expected, results, self.steps, strict=True):
            difference = _largest_difference(name, wanted.astype(np.float64), got)
            self.difference = max(self.difference, difference)
            if step is not None:
                self.lsb = max(self.lsb or 0, round(difference / step))
            axis = CLASS_AXES.get(wanted.ndim) if name in SCORES else None
            if axis is not None and wanted.shape[axis] > 1:
                same = wanted.argmax(axis) == got.argmax(axis)
                self.agreeing += int(same.sum())
                self.predictions += same.size

    def result(self) -> Agreement:
        share = self.agreeing / self.predictions if self.predictions else None
        return Agreement(share, self.lsb, self.difference)
