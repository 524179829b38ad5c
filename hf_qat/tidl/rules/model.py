"""Limits of the whole file: opset, fixed shapes, shape inference, batch, operator domains."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from hf_qat.export.onnx_graph import DEFAULT_DOMAINS, OnnxGraph
from hf_qat.tidl.clip import RANGE
from hf_qat.tidl.devices import OPTIONS_DOC, QUANTIZATION_DOC, Device
from hf_qat.tidl.graph import Graph
from hf_qat.tidl.rules.registry import Finding, graph_rule


SHAPES_SOURCE = "edgeai-tidl-tools, examples/osrt_python/ort/onnxrt_ep.py (infer_shapes_path before the session)"

#: ONNX Runtime's own operators, which TI's build has too, on the Arm core.
CONTRIBUTED = "com.microsoft"

#: What ONNX Runtime's dynamic quantization writes.
DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})


@graph_rule
def opset(graph: Graph, device: Device) -> Iterator[Finding]:
    """Not newer than TI's tools."""
    newest, older = device.max_opset, device.max_opset_11_0
    if graph.opset > newest.value:
        why = f"the file uses opset {graph.opset}; TI's tools know {newest.value}"
        yield Finding("opset", why, "export with opset_version=17", newest.source, "refused")
    elif graph.opset > older.value:
        why = f"the file uses opset {graph.opset}; tools 11.0 validate {older.value}"
        yield Finding("opset", why, "export with opset_version=17, or use newer tools", older.source, "warning")


@graph_rule
def fixed_inputs(graph: Graph, device: Device) -> Iterator[Finding]:
    """All sizes of all inputs are numbers."""
    for value in graph.inputs:
        shape = graph.scope.shape(value.name)
        if shape is None or any(not size for size in shape):
            sizes = [dim.dim_param or dim.dim_value or "?" for dim in value.type.tensor_type.shape.dim]
            yield Finding(
                "dynamic-shape",
                f"input {value.name} has the shape {sizes}",
                "export with fixed sizes (dynamic_batch=False)",
                SHAPES_SOURCE,
                "refused",
            )


@graph_rule
def shapes_are_stored(graph: Graph, device: Device) -> Iterator[Finding]:
    """Every value between two layers has its shape in the file."""
    if any(not size for value in graph.inputs for size in graph.scope.shape(value.name) or (None,)):
        return  # nothing can be inferred yet
    stored = OnnxGraph(graph.model.graph)
    names = [name for node in graph.proto.node for name in node.output if name and name not in graph.fixed]
    missing = [name for name in names if not _known(stored, name)]
    if not missing:
        return
    remedy = "run onnx.shape_inference.infer_shapes_path(path, path)"
    unknown = [name for name in missing if not _known(graph.scope, name)]
    if unknown:
        remedy = f"the shape of {unknown[0]} depends on the data: replace the layer that makes it"
    why = f"{len(missing)} of {len(names)} values have no shape, {missing[0]} the first"
    yield Finding("shape-inference", why, remedy, SHAPES_SOURCE, "refused")


def _known(scope: OnnxGraph, name: str) -> bool:
    shape = scope.shape(name)
    return shape is not None and None not in shape


@graph_rule
def batch(graph: Graph, device: Device) -> Iterator[Finding]:
    """One image at a time."""
    for value in graph.inputs:
        shape = graph.scope.shape(value.name)
        if shape is not None and len(shape) == 4 and shape[0] is not None and shape[0] > 1:
            yield Finding(
                "batch",
                f"input {value.name} takes {shape[0]} images at once",
                "export with a batch of 1, which is what TI validates",
                OPTIONS_DOC,
                "warning",
            )


@graph_rule
def domains(graph: Graph, device: Device) -> Iterator[Finding]:
    """Only ONNX's operators, and ONNX Runtime's."""
    foreign = {node.domain: node for node in graph.proto.node if node.domain not in (*DEFAULT_DOMAINS, CONTRIBUTED)}
    for domain, node in foreign.items():
        yield Finding(
            "domain",
            f"{node.op_type} is of the domain {domain}, which ONNX Runtime does not know",
            "export with ONNX's own operators",
            "ONNX Runtime",
            "refused",
        )


@graph_rule
def quantized(graph: Graph, device: Device) -> Iterator[Finding]:
    """Trained ranges are in the file: as quantizers, or as `Clip`."""
    dynamic = [node.op_type for node in graph.proto.node if node.op_type in DYNAMIC]
    if dynamic:
        yield Finding(
            "dynamic-ranges",
            f"the model is quantized dynamically ({dynamic[0]}): its ranges are computed at run time",
            "quantize it statically, so that the ranges are in the file: prepare_qat, train, convert, export_tidl",
            QUANTIZATION_DOC,
            "warning",
        )
    elif not graph.quantizers and not any(map(_is_range, graph.proto.node)):
        yield Finding(
            "no-quantizers",
            "the model is float: TIDL finds ranges by itself, which costs accuracy",
            "quantize it: prepare_qat, train, convert, export_tidl",
            QUANTIZATION_DOC,
            "warning",
        )


def _is_range(node: NodeProto) -> bool:
    """A `Clip` that `export_tidl(ranges="clip")` wrote, which is no ReLU6."""
    return node.op_type == "Clip" and node.name.endswith(RANGE)
