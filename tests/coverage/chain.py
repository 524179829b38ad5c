"""The chain that a model must pass: float → captured → prepared → trained → converted → ONNX Runtime.

Every link is compared with the one before by figures of its own; nothing here asserts, the tests do.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat import QATConfig, calibrate, convert, export_onnx, fake_quant_disabled, load_weights, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.export.float_operators import output_steps
from hf_qat.model import prepare as prepare_module
from hf_qat.model.in_float import float_operations
from hf_qat.model.quantized_share import float_layers, num_quantized_layers
from hf_qat.model.state import captured_children
from hf_qat.quantization.converted import QuantizedLayer
from hf_qat.quantization.quantizer import fake_quantizers
from tests.coverage.case import Case


#: Relative size of the perturbation that an unstable net is measured by.
PERTURBATION = 1e-5

#: Relative size of the last digit of a float.
PRECISION = 1e-7

OPSET = 17

#: ONNX Runtime's optimizations off.
PLAIN = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

#: Outputs that somebody reads; detectors return dozens of intermediate states beside them.
PREDICTIONS = (
    "logits",
    "pred_boxes",
    "predicted_depth",
    "class_queries_logits",
    "masks_queries_logits",
    "feature_maps",
)


@dataclass
class Row:
    """What the chain has measured of one model; fields stay at their defaults where it stopped.

    Attributes:
        refusal: the message of the `CaptureError`, else empty.
        captured: paths of the captured children.
        quantizers, layers: fake quantizers, and convolutions and linear layers with int8 weights.
        quantized, running: layers with a weight quantizer, and all that run.
        float_operations: (module path, operation, reason) of what stays float.
        float_children: children that stay float.
        unloaded: keys of the float model that its state dict did not fill again in the prepared one.
        capture_difference, loss_difference: captured against float, largest absolute difference.
        prepared_difference: prepared with quantizers off, relative to the largest output.
        precision: what a change of the input in the last digit does to the float model, relative likewise.
        losses: of the QAT steps.
        missing_gradients: parameters to which float gives a gradient and QAT none.
        batch_norms: modules that are still called after `convert()`.
        rms: relative root mean square of ONNX Runtime against the converted model; `sensitivity`: what the
            perturbation does to the converted model itself.
        optimized: `rms` with ONNX Runtime's optimizations.
        lsb: largest difference in steps of the output.
        opset: of the file.
    """

    refusal: str = ""
    captured: list[str] = field(default_factory=list)
    quantizers: int = 0
    layers: int = 0
    quantized: int = 0
    running: int = 0
    float_operations: list[tuple[str, str, str]] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    capture_difference: float = float("nan")
    loss_difference: float = float("nan")
    prepared_difference: float = float("nan")
    precision: float = float("nan")
    losses: list[float] = field(default_factory=list)
    missing_gradients: list[str] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    float_batch_norms: int = 0
    rms: float = float("nan")
    optimized: float = float("nan")
    sensitivity: float = float("nan")
    lsb: int | None = None
    opset: int = 0
    seconds: float = 0.0


def run(case: Case, exported: bool = True, row: Row | None = None) -> Row:
    """Drive one model through the whole chain, as far as ONNX Runtime if it is to be exported.

    Args:
        case: the model.
        exported: go as far as ONNX Runtime.
        row: is filled, as far as the chain comes.
    """
    start, row = time.process_time(), Row() if row is None else row
    model = case.make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # what prepare_qat does: so that the comparison is bit by bit
    reference = copy.deepcopy(model)
    try:
        with _after_capture(lambda: _compare_captured(row, case, model, reference)):
            prepare_qat(model, QATConfig(), case.labelled(2))
    except CaptureError as error:
        row.refusal = str(error)
        return row
    _describe(row, model)
    row.unloaded = _reload(model, reference)
    with fake_quant_disabled(model):
        expected = outputs(reference, case.batch(3))
        row.prepared_difference = relative_maximum(outputs(model, case.batch(3)), expected)
        row.precision = relative_maximum(outputs(reference, _perturbed(case.batch(3), PRECISION)), expected)
    calibrate(model, [case.batch(8, seed=1), case.batch(8, seed=2)], bias_correction=False)
    _train(row, case, model, reference)
    convert(model)
    row.batch_norms = _called_batch_norms(case, model)
    row.layers = sum(isinstance(module, QuantizedLayer) for module in model.modules())
    if exported:
        _export(row, case, model)
    row.seconds = time.process_time() - start
    return row


@contextmanager
def _after_capture(check: Any) -> Iterator[None]:
    """Call `check` inside `prepare_qat`, between capture and fusion, so that no second capture is needed."""
    original = prepare_module.capture

    def capture(*args: Any, **kwargs: Any) -> Any:
        captured = original(*args, **kwargs)
        check()
        return captured

    with mock.patch.object(prepare_module, "capture", capture):
        yield


def _compare_captured(row: Row, case: Case, model: nn.Module, reference: nn.Module) -> None:
    """At batches of 1, 2 and 5, with labels if there are any; without gradients `nn.MultiheadAttention` would fuse."""
    model.eval()
    differences, losses = [], []
    for batch in (1, 2, 5):
        inputs = case.labelled(batch, batch) if case.loss_in_evaluation else case.batch(batch, batch)
        ours, theirs = (_seeded(candidate, inputs) for candidate in (model, reference))
        pairs = zip(tensors(ours), tensors(theirs), strict=True)
        differences += [float((a - b).abs().max()) for a, b in pairs]
        if loss_of(theirs) is not None:
            losses.append(abs(float(loss_of(ours)) - float(loss_of(theirs))))
    row.capture_difference, row.loss_difference = max(differences), max(losses, default=0.0)


def _seeded(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Some losses sample points at random."""
    torch.manual_seed(0)
    return model(**_copy(inputs))


def _copy(inputs: dict[str, Any]) -> dict[str, Any]:
    """Losses write into nested labels."""
    return copy.deepcopy(inputs)


def _describe(row: Row, model: nn.Module) -> None:
    children = captured_children(model)
    row.captured = [path or type(model).__name__ for path in children]
    row.quantizers = len(fake_quantizers(model))
    row.quantized = num_quantized_layers(model)
    row.running = row.quantized + len(float_layers(model))
    row.float_operations = [(found.path, found.operation, found.reason) for found in float_operations(model)]


@torch.no_grad()
def _reload(model: nn.Module, reference: nn.Module) -> list[str]:
    """Wipe the float values of the prepared model, and fill them again from the float model's state dict."""
    state = reference.state_dict()
    ours = model.state_dict()
    for key in state.keys() & ours.keys():
        if state[key].is_floating_point():
            ours[key].zero_()
    report = load_weights(model, state, verbose=False)
    return sorted(state.keys() - set(report.matched))


def _train(row: Row, case: Case, model: nn.Module, reference: nn.Module) -> None:
    """Two steps of SGD in training mode, and the gradients of the first against those of the float model."""
    reference.train()
    _loss(case, reference, case.labelled(4)).backward()
    expected = {name for name, p in reference.named_parameters() if p.grad is not None}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        loss = _loss(case, model, case.labelled(4, seed=step))
        loss.backward()
        row.losses.append(float(loss))
        if step == 0:
            found = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
            row.missing_gradients = sorted(expected - found)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _loss(case: Case, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**_copy(inputs))
    loss = loss_of(output)
    if loss is None:
        return torch.stack([x.square().mean() for x in tensors(output)]).sum()
    return loss


def _called_batch_norms(case: Case, model: nn.Module) -> list[str]:
    """A backbone may have stages that nothing asks for; what is never called is not captured."""
    called: list[str] = []
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    hooks = [m.register_forward_hook(lambda *_, name=n: called.append(name)) for n, m in norms.items()]
    outputs(model, case.batch(2))
    for hook in hooks:
        hook.remove()
    return called


def _export(row: Row, case: Case, model: nn.Module) -> None:
    batch = case.batch(case.images, seed=3)
    expected = _one_by_one(model, batch)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_onnx(model, path, case.batch(1), opset_version=OPSET, verify=False)
        file = onnx.load(path)
        row.opset = file.opset_import[0].version
        row.float_batch_norms = sum(node.op_type == "BatchNormalization" for node in file.graph.node)
        found, steps = _run_file(path, batch), output_steps(file)
        fused = _run_file(path, batch, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    chosen = _predictions([value.name for value in file.graph.output], found)
    results = [found[k] for k in chosen]
    row.rms = relative_rms(results, expected)
    row.optimized = relative_rms([fused[k] for k in chosen], expected)
    row.sensitivity = relative_rms(_one_by_one(model, _perturbed(batch)), expected)
    differences = [float((a - b).abs().max()) for a, b in zip(results, expected, strict=True)]
    row.lsb = max((round(d / steps[k]) for d, k in zip(differences, chosen, strict=True) if steps[k]), default=None)


def _predictions(names: list[str], values: list[Tensor]) -> list[int]:
    """Positions of the outputs that `tensors` picks from the model's."""
    floating = [k for k, value in enumerate(values) if value.is_floating_point() and not names[k].startswith("loss")]
    chosen = [k for k in floating if any(names[k] == p or names[k].startswith(f"{p}_") for p in PREDICTIONS)]
    return chosen or floating


def _run_file(path: Path, batch: dict[str, Any], optimizations: Any = PLAIN) -> list[Tensor]:
    """All outputs of a file of batch 1, image by image."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = optimizations
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    parts = []
    for image in _images(batch):
        arrays = [leaf.numpy() for leaf in pytree.tree_leaves(image) if isinstance(leaf, Tensor)]
        parts.append(map(torch.from_numpy, map(np.asarray, session.run(None, dict(zip(names, arrays, strict=True))))))
    return [torch.cat(list(map(torch.atleast_1d, part))) for part in zip(*parts, strict=True)]


def _one_by_one(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """What `outputs` gives of each image, one after the other, as `_run_file` puts them together."""
    parts = [outputs(model, image) for image in _images(batch)]
    return [torch.cat(list(map(torch.atleast_1d, part))) for part in zip(*parts, strict=True)]


def _images(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches of one."""
    size = next(len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
    return [
        pytree.tree_map(lambda leaf, k=k: leaf[k : k + 1] if isinstance(leaf, Tensor) else leaf, batch)
        for k in range(size)
    ]


def _perturbed(batch: dict[str, Any], size: float = PERTURBATION) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)

    def disturb(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf * (1 + size * torch.randn(leaf.shape, generator=generator))

    return pytree.tree_map(disturb, batch)


def loss_of(output: Any) -> Tensor | None:
    """The loss of a `ModelOutput`, if it has one."""
    return output.get("loss") if isinstance(output, Mapping) else None


def tensors(output: Any) -> list[Tensor]:
    """Floating-point predictions in an output, or all that it holds but the losses."""
    if isinstance(output, Mapping):
        predictions = {name: value for name, value in output.items() if name in PREDICTIONS}
        output = predictions or {name: value for name, value in output.items() if not name.startswith("loss")}
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Of one call in evaluation mode; masked autoencoders draw there what they hide."""
    model.eval()
    torch.manual_seed(0)
    return tensors(model(**batch))


def relative_maximum(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, over outputs, relative to the largest value of its output."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def relative_rms(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Root mean square of the difference over that of the value, of the worst output."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
