"""`check_tidl`: what TIDL will take of an ONNX file, layer by layer, before anyone owns a board."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hf_qat.export.onnx_graph import DEFAULT_DOMAINS
from hf_qat.tidl.devices import OPERATORS_DOC, Device, find_device
from hf_qat.tidl.graph import Graph, Layer, load
from hf_qat.tidl.macs import macs
from hf_qat.tidl.operators import MAX_SUBGRAPHS, OPERATORS
from hf_qat.tidl.optimizer_rules import OPTIMIZER_RULES
from hf_qat.tidl.report import HEADINGS, Issue, LayerReport, TidlReport
from hf_qat.tidl.rules import GRAPH_RULES, LAYER_RULES, Finding
from hf_qat.tidl.rules.model import CONTRIBUTED
from hf_qat.tidl.rules.registry import newer_tools, operator_source


#: What to write in place of operators that TIDL does not know.
REMEDIES = {
    "Gelu": "export with opset_version=17, which writes GELU as TIDL knows it",
    "Shape": "export with fixed sizes, then fold constants (onnxsim)",
    "Range": "export with fixed sizes, then fold constants (onnxsim)",
    "Einsum": "write it as MatMul, Transpose and Reshape",
    "GroupNormalization": "use batch norm, or layer norm over the last axis",
    "If": "export one branch: TIDL has no control flow",
    "Loop": "unroll it: TIDL has no control flow",
}


def check_tidl(onnx_path: str | os.PathLike[str], target: str) -> TidlReport:
    """Say of each layer whether TIDL's accelerator takes it, by TI's published limits.

    Args:
        onnx_path: any ONNX file, ours or not, quantized or float.
        target: the device: `TDA4VM`, `AM62A`, `AM67A`, `AM68A`, `AM69A`, or a part number such as `J721S2`.

    Returns:
        A report: `.ok`, `.issues`, `.layers`; `str()` of it is meant to be read. It is a prediction from documents.

    Raises:
        ConfigError: no such device.
        ExportError: the file cannot be read as ONNX.
    """
    device, path = find_device(target), Path(onnx_path)
    graph = Graph(load(path))
    whole = [_issue(found) for rule in GRAPH_RULES for found in rule(graph, device)]
    issues = [*whole, *(_issue(found, layer) for layer in graph.quantizers for found in _findings(layer, device))]
    layers = []
    for layer in graph.layers:
        found = [_issue(finding, layer) for finding in _findings(layer, device)]
        layers.append(_verdict(layer, found))
        issues += found
    parts = subgraphs(graph, {layer.name for layer in layers if layer.runs_on == "accelerator"})
    if parts > MAX_SUBGRAPHS:
        issues.append(_too_many(parts))
    order = list(HEADINGS)
    return TidlReport(
        path=path,
        target=device.name,
        soc=device.soc,
        layers=layers,
        issues=sorted(issues, key=lambda issue: order.index(issue.verdict)),
        subgraphs=parts,
        notes=[f"{fact.value} ({fact.source})" for fact in device.warnings],
    )


def _findings(layer: Layer, device: Device) -> Iterator[Finding]:
    for rule in LAYER_RULES.get(layer.operator, ()):
        yield from rule(layer, device)
    if layer.graph.is_quantizer(layer.node):
        return
    row = OPERATORS.get(layer.operator)
    if row is None and layer.operator not in LAYER_RULES:
        yield Finding(
            "operator",
            "TIDL has no such layer",
            REMEDIES.get(layer.operator, "replace it by operators that TIDL knows, or leave it to the Arm core"),
            OPERATORS_DOC,
        )
    elif row is not None and row.since_11_0 and layer.operator != "ReduceMean":
        yield newer_tools(layer.operator)
    if row is not None and row.dims is not None:
        yield from _dims(layer, row.dims)


def _dims(layer: Layer, most: int) -> Iterator[Finding]:
    for name in layer.variables:
        shape = layer.graph.scope.shape(name)
        large = 0 if shape is None else sum(size != 1 for size in shape)
        if large > most:
            yield Finding(
                "dims",
                f"an input has {large} sizes above 1, of at most {most}: {list(shape or ())}",
                "reshape, so that fewer sizes are above 1",
                operator_source(layer.operator),
            )


def _issue(found: Finding, layer: Layer | None = None) -> Issue:
    name, operator = ("", "") if layer is None else (layer.name, layer.operator)
    rule = OPTIMIZER_RULES.get((found.rule, operator))
    remedy = found.remedy if rule is None else f"{found.remedy}; or apply {rule} of TI's model optimizer"
    return Issue(found.verdict, found.rule, name, operator, found.why, remedy, found.source)


def _verdict(layer: Layer, issues: list[Issue]) -> LayerReport:
    verdicts = {issue.verdict for issue in issues}
    foreign = layer.node.domain not in (*DEFAULT_DOMAINS, CONTRIBUTED)
    if "refused" in verdicts or foreign:
        place = "refused"
    else:
        place = "arm" if "arm" in verdicts else "accelerator"
    row = OPERATORS.get(layer.operator)
    return LayerReport(layer.name, layer.operator, place, macs(layer), row.layer if row else "")


def subgraphs(graph: Graph, accelerated: set[str]) -> int:
    """How many parts the accelerated layers form, if none of them may wait for the Arm core in its middle.

    A layer's depth is the number of changes to the Arm core on the way to it; neighbours of the same depth are one
    part.
    """
    depth: dict[str, int] = {}
    part: dict[str, int] = {}
    merged: dict[int, int] = {}

    def root(number: int) -> int:
        while merged.setdefault(number, number) != number:
            number = merged[number]
        return number

    for node in graph.proto.node:
        layer = Layer(graph, node)
        before = [name for name in layer.variables if name in depth]
        deepest = max((depth[name] for name in before), default=0)
        inside = layer.name in accelerated or graph.is_quantizer(node)
        if not inside and not graph.fixed.issuperset(node.output):
            deepest += any(name in part for name in before)
        for name in node.output:
            depth[name] = deepest
        if layer.name in accelerated or (inside and any(name in part for name in before)):
            number = root(len(merged))
            for name in before:
                if name in part and depth[name] == deepest:
                    merged[root(part[name])] = number
            part.update(dict.fromkeys(node.output, number))
    return len({root(number) for number in part.values()})


def _too_many(parts: int) -> Issue:
    return Issue(
        "warning",
        "subgraphs",
        "",
        "",
        f"layers on the Arm core cut the model into {parts} parts, of which TIDL compiles {MAX_SUBGRAPHS}",
        "replace the layers that run on the Arm core",
        "edgeai-tidl-tools, examples/osrt_python/README.md, max_num_subgraphs",
    )
