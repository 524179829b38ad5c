"""`export_onnx`: a converted model as a Q/DQ ONNX file, written as a whole and checked on ONNX Runtime."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import torch
from torch import nn

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CaptureError, ExportError, FixedBatchError, StageError
from hf_qat.export.cleanup import clean_up, set_metadata
from hf_qat.export.decomposing import decomposing_in_place
from hf_qat.export.float_operators import count_quantize_nodes
from hf_qat.export.io_names import ExportCall, example_of, export_call, output_names, require_tensors, set_names
from hf_qat.export.onnx_graph import opset_of
from hf_qat.export.opset import SUPPORTED_OPSETS, lower_opset
from hf_qat.export.refusals import require_expressible
from hf_qat.export.report import ExportReport
from hf_qat.export.simplifying import simplify
from hf_qat.export.translations import translations
from hf_qat.export.verify import describe, require_agreement, require_onnxruntime, verify_onnx
from hf_qat.files.atomic import whole_file
from hf_qat.graph.capture.inputs import Inputs, device_of
from hf_qat.graph.one_at_a_time import TURN
from hf_qat.graph.progress import progress
from hf_qat.model.eager import in_eager_mode, uncompiled
from hf_qat.model.finite import require_finite
from hf_qat.model.state import require_stage, state_of
from hf_qat.quantization.converted import QuantizeDequantize
from hf_qat.version import __version__


#: The oldest opset that PyTorch's exporter writes; older ones are lowered from it.
EXPORTER_OPSET = 18


@in_eager_mode()
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs | None = None,
    *,
    opset_version: int = 17,
    dynamic_batch: bool = False,
    verify: bool = True,
) -> ExportReport:
    """Write a converted model as ONNX with `QuantizeLinear` / `DequantizeLinear`, and compare both.

    Args:
        model: converted, on any device; is left as it is.
        path: the file to write; its directory is made if need be, and an existing file is replaced only when the new
            one is complete and verified.
        example_inputs: a tensor, a tuple or a dict, as forward takes it: real inputs make the verification telling.
            Random ones, of the captured shapes, if left out.
        opset_version: 17, 18 or 21; the file states this very one.
        dynamic_batch: the first axis of all inputs is free; else it is 1.
        verify: run the file on ONNX Runtime and compare with torch, on `example_inputs`.

    Raises:
        StageError: the model is not converted.
        NonFiniteError: a weight or a scale holds NaN or infinity.
        ExportError: the path cannot be written to, a package is missing, the model cannot be expressed at this opset,
            or ONNX Runtime computes something else than torch. No file is left behind then, and an earlier one stays.
        FixedBatchError: an `ExportError`: the model cannot be exported with a free batch.
    """
    model = uncompiled(model)
    config = _require_converted(model)
    require_expressible(model)
    require_finite(model, "export")
    _require_tools(opset_version, verify)
    path = Path(path)
    with whole_file(path) as temporary, progress(f"Exporting {path.name}", 2, "step") as bar:
        inputs = example_of(model) if example_inputs is None else example_inputs
        exported = _on_cpu(model)
        file = _to_proto(exported, export_call(exported, inputs, dynamic_batch), config, opset_version)
        set_metadata(file, _metadata(config))
        _check(file, opset_version)
        temporary.write_bytes(file.SerializeToString())
        bar.update()
        report = verify_onnx(model, temporary, [inputs]) if verify else describe(model, temporary, file)
        bar.update()
        require_agreement(report)
    return replace(report, path=path)


def _require_converted(model: nn.Module) -> QATConfig:
    state = state_of(model)
    if state is not None and state.stage is Stage.PREPARED:
        raise StageError(
            "cannot export: the model is prepared for training, not converted. Convert a copy, so that training can "
            "go on: export_onnx(convert(copy.deepcopy(model)), path)."
        )
    return require_stage(model, Stage.CONVERTED, "export").config


def _require_tools(opset_version: int, verify: bool) -> None:
    if not isinstance(opset_version, int) or opset_version not in SUPPORTED_OPSETS:
        numbers = ", ".join(map(str, SUPPORTED_OPSETS))
        raise ExportError(f"opset_version={opset_version!r} is not supported: choose one of the numbers {numbers}.")
    if find_spec("onnxscript") is None:
        raise ExportError('PyTorch exports with onnxscript, which is not installed: pip install "hf_qat[export]".')
    if verify:
        require_onnxruntime()


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model, or a copy on the CPU, where the exporter makes its constants."""
    return model if device_of(model).type == "cpu" else copy.deepcopy(model).to("cpu")


def _to_proto(model: nn.Module, call: ExportCall, config: QATConfig, opset_version: int) -> onnx.ModelProto:
    """Export, lower to the opset asked for, and clean up."""
    try:
        with TURN, _quiet(), decomposing_in_place():
            program = torch.onnx.export(
                model,
                call.args,
                kwargs=call.kwargs,
                input_names=call.input_names,
                dynamic_shapes=call.dynamic_shapes,
                opset_version=max(opset_version, EXPORTER_OPSET),
                custom_translation_table=translations(config.weight_scheme),
                verbose=False,
                optimize=False,
            )
            assert program is not None and program.exported_program is not None
            simplify(program.model)
    except Exception as error:
        cause = _innermost(error)
        if isinstance(cause, CaptureError):
            raise cause from None  # the call is none that the model takes
        require_tensors(model, call)
        kind = ExportError if call.dynamic_shapes is None else FixedBatchError
        raise kind(f"PyTorch cannot export {type(model).__name__} to ONNX: {_reason(cause)}") from error
    outputs = output_names(model, program.exported_program, call.input_names)
    set_names(program.model.graph, call.input_names, outputs)
    _register_constants(program)
    file = clean_up(lower_opset(program.model_proto, opset_version))
    _require_pairs(model, file, call.dynamic_shapes is not None)
    return file


def _require_pairs(model: nn.Module, file: onnx.ModelProto, dynamic: bool) -> None:
    """Refuse a file without a single pair: PyTorch then traces in another way, and quantizers become arithmetic."""
    if count_quantize_nodes(file) or not any(isinstance(module, QuantizeDequantize) for module in model.modules()):
        return
    if dynamic:
        raise FixedBatchError(
            f"{type(model).__name__} computes for one size of the batch only, as PyTorch exports it: call export_onnx "
            "with dynamic_batch=False."
        )
    raise ExportError(f"PyTorch writes no QuantizeLinear for {type(model).__name__}: please report this model.")


def _register_constants(program: torch.onnx.ONNXProgram) -> None:
    """Add, in place, the constants that nodes read and the graph lacks.

    The exporter's fusion of two clamps (onnxscript 0.7.2) makes new bounds, and loses them where the same two clamps
    stand in the model twice, as in detectors that refine boxes.
    """
    graph = program.model.graph
    known = {value.name for value in graph.inputs} | set(graph.initializers)
    for node in graph:
        for value in node.inputs:
            lost = value is not None and value.producer() is None and value.name not in known
            if value is not None and lost and value.const_value is not None:
                graph.register_initializer(value)
                known.add(value.name)


def _innermost(error: BaseException) -> BaseException:
    """What an error was caused by in the first place: the exporter wraps it in pages of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """The kind of an error, and its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own dependencies and deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _metadata(config: QATConfig) -> dict[str, str]:
    return {
        "hf_qat.version": __version__,
        "hf_qat.target": config.target,
        "hf_qat.config": json.dumps(config.to_dict()),
    }


def _check(file: onnx.ModelProto, opset_version: int) -> None:
    """The file is valid and states the opset that was asked for."""
    if opset_of(file) != opset_version:
        raise ExportError(f"PyTorch wrote opset {opset_of(file)}, not {opset_version}; export with another one.")
    try:
        onnx.checker.check_model(file, full_check=True)
    except Exception as error:
        raise ExportError(f"the exported model is not valid ONNX at opset {opset_version}: {error}") from error
