"""The options that a model is compiled with, in TI's words.

Sources: edgeai-benchmark, edgeai_benchmark/core/runtime_options.py (`runtime_options_onnx_qat_v1`, `…_qat_v2`,
`…_qat_v2_p2`) and edgeai-tidl-tools, examples/osrt_python/README.md, "User options for TIDL Acceleration".
"""

from __future__ import annotations

from typing import Any, Literal

from hf_qat.tidl.devices import Device
from hf_qat.tidl.operators import MAX_SUBGRAPH_NODES, MAX_SUBGRAPHS


#: How a bundle's model carries its ranges.
Ranges = Literal["qdq", "clip"]

#: `prequantized_model_type` of edgeai-benchmark.
PREQUANTIZED = {"clip": 0, "qdq": 1}


def runtime_options(device: Device, frames: int, ranges: Ranges) -> dict[str, Any]:
    """Options of the session that compiles, but for the two paths, which the machine decides.

    Args:
        device: what to compile for.
        frames: how many calibration frames the bundle has: the import ends after so many runs.
        ranges: Q/DQ models bring all ranges; for a `Clip` model TIDL reads the ranges off the clips.
    """
    options: dict[str, Any] = {
        "tensor_bits": 8,
        "accuracy_level": 0,  # the ranges were trained: no calibration of TIDL's own
        "debug_level": 0,
        "max_num_subgraphs": MAX_SUBGRAPHS,
        "advanced_options:max_num_subgraph_nodes": MAX_SUBGRAPH_NODES,
        "advanced_options:quantization_scale_type": device.scale_type.value,
        "advanced_options:calibration_frames": frames,
        "advanced_options:calibration_iterations": -1,  # as TI sets it for all trained ranges
        "advanced_options:add_data_convert_ops": 3,  # conversions of input and output on the accelerator
    }
    if ranges == "qdq":
        options["advanced_options:prequantized_model"] = 1
        options["advanced_options:quant_params_proto_path"] = ""  # no ranges but those of the file
    return options
