"""`analyze_onnx`: what quantization costs, layer by layer, in a Q/DQ file; computed by ONNX Runtime."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, ValueInfoProto
from torch import Tensor
from torch.utils import _pytree as pytree

from hf_qat.errors import AnalysisError
from hf_qat.export.float_operators import float_operators
from hf_qat.export.onnx_layers import OnnxLayer, Wiring, quantized_layers, values_in_twin, without_rounding
from hf_qat.export.verify import Session, require_onnxruntime
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.progress import progress
from hf_qat.model.analysis.analysis import Analysis
from hf_qat.model.analysis.findings import with_findings
from hf_qat.model.analysis.histogram import histogram
from hf_qat.model.analysis.layer import LayerAnalysis
from hf_qat.model.analysis.noise import Noise, sqnr
from hf_qat.model.in_float import FloatOperation


#: Why an operator of a file is in float, as far as the file tells.
REASON = "what it computes with is not quantized"


def analyze_onnx(
    path: str | Path, batches: Iterable[Inputs], reference: str | Path | None = None, *, num_batches: int = 4
) -> Analysis:
    """Compare a Q/DQ file with its float twin at every layer, on ONNX Runtime without optimizations.

    Args:
        path: of a file that `export_onnx` wrote.
        batches: tensors, tuples in the order of the file's inputs, or dicts by their names.
        reference: a float ONNX file of the same model; it may have batch norms. Layers with weights are compared. If
            left out, the file is compared with itself without rounding of activations, at every value that it rounds;
            its weights are the codes then, so what these lose is not seen.
        num_batches: of `batches`, how many to use.

    Raises:
        AnalysisError: no Q/DQ file, no batch, or a reference with other layers.
        ExportError: ONNX Runtime is missing, does not load a file, or the batches do not fit it.
    """
    require_onnxruntime()
    model = _load(Path(path))
    layers = quantized_layers(model)
    if not layers:
        raise AnalysisError(f"{path} rounds nothing: give a file that export_onnx has written, with Q/DQ pairs.")
    twin = without_rounding(model) if reference is None else _load(Path(reference))
    if reference is None:
        exact = {layer.path: layer.before for layer in layers}
    else:
        exact = values_in_twin(layers, model, twin)
        layers = [layer for layer in layers if layer.path in exact]
    kept = list(islice(batches, num_batches))
    if not kept:
        raise AnalysisError("analyze_onnx got no batches: pass an iterable that yields at least one.")
    noises, outputs = _measure(model, twin, layers, exact, kept)
    wiring = Wiring(model.graph)
    return Analysis(
        layers=tuple(_layer(layer, noises[layer.path], wiring) for layer in layers),
        output_sqnr=outputs.ratio,
        float_operations=tuple(
            FloatOperation(name.rpartition("/")[0], operator, REASON)
            for operator, names in float_operators(onnx.shape_inference.infer_shapes(model)).items()
            for name in names
        ),
        metric="",
    )


def _load(path: Path) -> ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:
        raise AnalysisError(f"cannot read {path}: {error}") from error


def _measure(
    model: ModelProto,
    twin: ModelProto,
    layers: Sequence[OnnxLayer],
    exact: Mapping[str, str],
    batches: Sequence[Inputs],
) -> tuple[dict[str, Noise], Noise]:
    """Noise of each layer, by path, and that of the outputs."""
    noises, of_outputs = {layer.path: Noise() for layer in layers}, Noise()
    with tempfile.TemporaryDirectory() as folder, progress("Comparing", len(batches), "batch") as bar:
        ours = _session(model, [name for layer in layers for name in (layer.before, layer.after)], folder, "ours")
        theirs = _session(twin, list(exact.values()), folder, "twin")
        for batch in batches:
            rounded, expected = _run(ours, batch), _run(theirs, batch)
            for layer in layers:
                noise, after = noises[layer.path], rounded[layer.after]
                noise.compare(expected[exact[layer.path]], after)
                noise.add_rounding(rounded[layer.before], after, _bounds(layer))
                if layer.weighted is not None and after.dim() > 1:
                    noise.add_channels(after, 1 if layer.weighted.op_type.startswith("Conv") else after.dim() - 1)
            for mine, other in zip(model.graph.output, twin.graph.output, strict=True):
                of_outputs.compare(expected[other.name], rounded[mine.name])
            bar.update()
    return noises, of_outputs


def _session(model: ModelProto, names: Iterable[str], folder: str, name: str) -> Session:
    """With further values among the outputs."""
    known = {value.name for value in (*model.graph.output, *model.graph.input)}
    extended = ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(ValueInfoProto(name=value) for value in dict.fromkeys(names) if value not in known)
    path = Path(folder) / f"{name}.onnx"
    onnx.save(extended, path)
    return Session(path, optimized=False)


def _run(session: Session, batch: Inputs) -> dict[str, Tensor]:
    """All values by name, those of the inputs too: float32."""
    given = _arrays(session, batch)
    values = dict(zip(session.outputs, session.run(list(given.values())), strict=True))
    return {name: torch.from_numpy(np.asarray(value)).float() for name, value in {**given, **values}.items()}


def _arrays(session: Session, batch: Inputs) -> dict[str, np.ndarray]:
    if isinstance(batch, Mapping) and all(name in batch for name in session.inputs):
        return {name: batch[name].detach().cpu().numpy() for name in session.inputs}
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if len(tensors) != len(session.inputs):
        raise AnalysisError(
            f"a batch holds {len(tensors)} tensors, and the file takes {', '.join(session.inputs)}: give a dict by "
            "these names, or a tuple in this order."
        )
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(session.inputs, tensors, strict=True)}


def _bounds(layer: OnnxLayer) -> tuple[float, float]:
    limits = np.iinfo(layer.zero_point.dtype)
    scale, zero = float(layer.scale), int(layer.zero_point)
    return (limits.min - zero) * scale, (limits.max - zero) * scale


def _layer(layer: OnnxLayer, noise: Noise, wiring: Wiring) -> LayerAnalysis:
    lower, upper = _bounds(layer)
    weight: Any = None if layer.weighted is None else wiring.quantized_weight(layer.weighted)
    codes = None if weight is None else wiring.constants.constant(weight.input[0])
    channels = noise.channel_minimum
    dead = None if channels is None or noise.channel_maximum is None else channels.eq(noise.channel_maximum)
    assert noise.counts is not None
    return with_findings(
        LayerAnalysis(
            path=layer.path,
            operation=layer.operation,
            sqnr=noise.ratio,
            own_sqnr=sqnr(noise.own_signal, noise.own_noise),
            weight_bits=None if codes is None else _bits(codes),
            activation_bits=8 * layer.zero_point.dtype.itemsize,
            minimum=noise.minimum,
            maximum=noise.maximum,
            bulk=noise.bulk,
            lower=lower,
            upper=upper,
            saturated=noise.outside / max(1, noise.count),
            channels=0 if dead is None else dead.numel(),
            dead_channels=0 if dead is None else int(dead.sum()),
            activations=histogram(noise.counts, (lower, upper), 2 ** (8 * layer.zero_point.dtype.itemsize)),
        )
    )


def _bits(codes: np.ndarray) -> int:
    """The least of 2, 4, 8 and 16 bits that hold these codes."""
    largest = int(np.abs(codes.astype(np.int64)).max(initial=1))
    return next(bits for bits in (2, 4, 8, 16) if math.log2(largest + 1) <= bits - 1)
