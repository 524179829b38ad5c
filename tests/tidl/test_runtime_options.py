"""Options against what TI's own code sets for trained ranges; every fact has its place there.

Source: github.com/TexasInstruments/edgeai-tensorlab at 15bc7ea, edgeai_benchmark/core/runtime_options.py; defaults and
meanings: edgeai-tidl-tools, examples/osrt_python/README.md.
"""

from __future__ import annotations

import pytest

from hf_qat.tidl.devices import find_device
from hf_qat.tidl.runtime_options import runtime_options


#: What `get_runtime_options(is_qat=True)` sets whatever the model, of the options that are not for float models alone.
ALWAYS = {
    "accuracy_level": 0,  # _get_calibration_accuracy_level: "For QAT models, simple calibration is sufficient"
    "debug_level": 0,
    "advanced_options:add_data_convert_ops": 3,  # "moving them from arm to c7x"
}

#: Its functions, by what they add: `kwargs` of …_qat_v1 (Clip), …_qat_v2 and …_qat_v2_p2 (Q/DQ).
SCALE_TYPE, PREQUANTIZED = "advanced_options:quantization_scale_type", "advanced_options:prequantized_model"
TI = {
    "runtime_options_onnx_qat_v1": {SCALE_TYPE: 1},
    "runtime_options_onnx_qat_v2": {SCALE_TYPE: 4, PREQUANTIZED: 1},
    "runtime_options_onnx_qat_v2_p2": {SCALE_TYPE: 1, PREQUANTIZED: 1},
}

#: Device and ranges → TI's function for them: TDA4VM is the device of powers of two.
USED = {
    ("TDA4VM", "clip"): "runtime_options_onnx_qat_v1",
    ("TDA4VM", "qdq"): "runtime_options_onnx_qat_v2_p2",
    **{(device, "qdq"): "runtime_options_onnx_qat_v2" for device in ("AM62A", "AM67A", "AM68A", "AM69A")},
}


@pytest.mark.parametrize(("device", "ranges"), USED, ids=[" ".join(key) for key in USED])
def test_options_are_those_that_ti_sets_for_trained_ranges(device, ranges):
    options = runtime_options(find_device(device), 7, ranges)
    expected = {**ALWAYS, **TI[USED[device, ranges]]}
    assert {name: options.get(name) for name in expected} == expected
    assert (PREQUANTIZED in options) == (PREQUANTIZED in expected)


@pytest.mark.parametrize(("device", "ranges"), USED, ids=[" ".join(key) for key in USED])
def test_the_import_ends_after_the_frames_that_there_are_and_iterates_over_none(device, ranges):
    options = runtime_options(find_device(device), 7, ranges)
    assert options["advanced_options:calibration_frames"] == 7
    # TI writes -1 for trained ranges (_get_calibration_iterations), and 1 where it takes the larger of that and 1.
    assert options["advanced_options:calibration_iterations"] in (-1, 1)
    assert options["tensor_bits"] == 8  # pre-quantized models: "8-bit only" (docs/tidl_fsg_quantization.md)
    assert options["max_num_subgraphs"] == 16  # the default of examples/osrt_python/README.md
