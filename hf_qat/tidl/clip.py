"""The older form of a trained model for TDA4VM: float weights on their grid, and `Clip` nodes that carry the ranges.

Source: edgeai-tidl-tools, docs/tidl_fsg_quantization.md, section D, and edgeai-benchmark's
`runtime_options_onnx_qat_v1`. TIDL quantizes weights and activations again, to the power of two above the range: the
grid that the model was trained with.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from hf_qat.errors import ExportError
from hf_qat.export.cleanup import drop_unused_values
from hf_qat.export.onnx_graph import replace_values
from hf_qat.tidl.graph import DEQUANTIZE, QUANTIZE, Graph, Quantizer


#: What the names of the nodes that carry ranges end in.
RANGE = "/Range"


def clips_for_quantizers(model: ModelProto) -> ModelProto:
    """Replace each Q/DQ pair by a `Clip`, and each dequantized constant by its float value.

    Args:
        model: Q/DQ, with power-of-two scales, one per tensor, and zero points of 0; is changed.

    Returns:
        The same object: it computes what the Q/DQ model does, but for the rounding of activations.

    Raises:
        ExportError: another scheme, or activations of fewer than 8 bits.
    """
    graph = Graph(model)
    renamed: dict[str, str] = {}
    for node in list(model.graph.node):
        if node.op_type == DEQUANTIZE and node.output[0] in graph.fixed:
            _float_constant(model, node, graph)
        elif node.op_type == "Clip" and _clips_codes(node, graph):
            raise ExportError(
                f'{node.input[0]} has fewer than 8 bits, which TIDL does not take and ranges="clip" cannot express: '
                'train with activations of 8 bits, as QATConfig(target="TDA4VM") does.'
            )
        elif node.op_type == QUANTIZE:
            _clip(model, node, graph.quantizer(node))
        elif node.op_type == DEQUANTIZE:
            renamed[node.output[0]] = node.input[0]
            model.graph.node.remove(node)
    _rename(model, renamed)
    drop_unused_values(model)
    del model.graph.value_info[:]
    return model


def _float_constant(model: ModelProto, node: NodeProto, graph: Graph) -> None:
    value = graph.constant(node.output[0])
    if value is None:
        raise ExportError(f"{node.name} dequantizes something that is no constant: the Clip form cannot express it.")
    model.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    model.graph.node.remove(node)


def _clips_codes(node: NodeProto, graph: Graph) -> bool:
    """Whether a `Clip` stands between the halves of a pair, which makes the codes fewer."""
    maker = graph.makers.get(node.input[0])
    return maker is not None and maker.op_type == QUANTIZE


def _clip(model: ModelProto, node: NodeProto, quantizer: Quantizer) -> None:
    if quantizer.scale is None or quantizer.per_channel or quantizer.dtype is None or np.any(quantizer.zero_point):
        raise ExportError(
            f'{node.name} has a zero point or several scales, which ranges="clip" cannot express: train with '
            'QATConfig(target="TDA4VM").'
        )
    codes, scale = np.iinfo(quantizer.dtype), float(quantizer.scale)
    names = []
    for end, code in (("min", codes.min), ("max", codes.max)):
        names.append(f"{node.output[0]}/{end}")
        model.graph.initializer.append(numpy_helper.from_array(np.array(code * scale, np.float32), names[-1]))
    clip = helper.make_node("Clip", [node.input[0], *names], list(node.output), name=f"{node.name}{RANGE}")
    model.graph.node.insert(list(model.graph.node).index(node), clip)
    model.graph.node.remove(node)


def _rename(model: ModelProto, renamed: dict[str, str]) -> None:
    """Let readers of a dequantized value read the clipped one; the model's outputs keep their names."""
    outputs = {output.name for output in model.graph.output}
    kept = {clipped: name for name, clipped in renamed.items() if name in outputs}
    replace_values(model.graph, {name: kept.get(clipped, clipped) for name, clipped in renamed.items()})
    for node in model.graph.node:
        for position, name in enumerate(node.output):
            node.output[position] = kept.get(name, name)
    replace_values(model.graph, kept)
