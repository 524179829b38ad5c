"""What Texas Instruments' devices compute, as data: each fact with the document it comes from.

Operators and their limits are the same on all devices but for the facts here; they are in `operators.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from hf_qat.config.targets import did_you_mean
from hf_qat.errors import ConfigError


Value = TypeVar("Value")

#: TI's documents. Where two of them disagree, a layer counts as supported if the newer one lists it, with a warning
#: that names the older one.
OPERATORS_DOC = "edgeai-tidl-tools, docs/operators.md"
OPERATORS_DOC_11_0 = "edgeai-tidl-tools 11_00_06_00, docs/supported_ops_rts_versions.md"
QUANTIZATION_DOC = "edgeai-tidl-tools, docs/tidl_fsg_quantization.md"
TRANSFORMERS_DOC = "edgeai-tidl-tools, docs/vision_transformers.md"
OPTIONS_DOC = "edgeai-tidl-tools, examples/osrt_python/README.md"
PRESETS = "edgeai-benchmark, edgeai_benchmark/core/presets.py, TARGET_DEVICE_SETTINGS_PRESETS"
RUNTIME_OPTIONS = "edgeai-benchmark, edgeai_benchmark/core/runtime_options.py"


@dataclass(frozen=True)
class Fact(Generic[Value]):
    """A value and the document that states it."""

    value: Value
    source: str


@dataclass(frozen=True)
class Device:
    """One row of the table of devices.

    Attributes:
        name: as in `hf_qat.targets()`, where the scheme that models are trained with is.
        soc: TI's part number.
        tools: what TI's set-up script calls it, in the variable `SOC`.
        scale_type: `advanced_options:quantization_scale_type` for a Q/DQ model.
        power_of_two: scales must be powers of two.
        asymmetric: activations may have a zero point.
        per_channel: weights may have one scale per output channel.
        mixed_sign_matmul: a product of two activations may have one signed and one unsigned input.
        lut: non-linear activations are looked up in a table, not computed step by step.
        conv_3x3_stride_3: a 3x3 convolution may have stride 3.
        pad_wider_than_input: a convolution may pad more than its input is wide.
        max_opset: the newest ONNX opset that TI's newest tools validate, and
        max_opset_11_0: the one that tools 11.0 do.
        warnings: what a user of this device should know.
    """

    name: str
    soc: str
    tools: Fact[str]
    scale_type: Fact[int]
    power_of_two: Fact[bool]
    asymmetric: Fact[bool]
    per_channel: Fact[bool]
    mixed_sign_matmul: Fact[bool]
    lut: Fact[bool]
    conv_3x3_stride_3: Fact[bool]
    pad_wider_than_input: Fact[bool]
    warnings: tuple[Fact[str], ...]
    max_opset: Fact[int] = Fact(21, f"{OPERATORS_DOC}, Version: ONNX Runtime 1.23, opset 21")
    max_opset_11_0: Fact[int] = Fact(19, f"{OPERATORS_DOC_11_0}: ONNX Runtime 1.15, opset 19")


_SETUP = "edgeai-tidl-tools, README.md and setup.sh"
_FEATURES = f"{OPERATORS_DOC_11_0}, Feature set comparison across devices"
_CONV = f"{OPERATORS_DOC}, Conv"

_AXIS = Fact(
    "TI's table of operators says that Q/DQ nodes take only axis 1; TI's own published Q/DQ model (cl-6508) has its "
    "weights on axis 0, and so has this one.",
    f"{OPERATORS_DOC}, QuantizeLinear and DequantizeLinear",
)
_TRANSFORMERS = Fact(
    "TI has validated vision transformers exported from timm (DeiT, Swin, DETR, SegFormer), and asks to compile them "
    "with ONNX Runtime's optimizations off; compile.py does so.",
    TRANSFORMERS_DOC,
)
_NO_LUT = Fact(
    "Sigmoid, HardSigmoid, Tanh, GELU, Elu and Softmax have no look-up table on this device and are slower.", _FEATURES
)
_QDQ_OR_CLIP = Fact(
    "TI's documents contradict each other on trained ranges for this device: edgeai-benchmark compiles Q/DQ models "
    "(runtime_options_onnx_qat_v2_p2), the quantization guide names models whose Clip nodes carry the ranges. Q/DQ is "
    'the default here, ranges="clip" the other form; neither was verified on a board.',
    f"{RUNTIME_OPTIONS}; {QUANTIZATION_DOC}, section D",
)


def _second_generation(name: str, soc: str, *, lut: bool = True, conv_limits: bool = False) -> Device:
    """A device with the second matrix accelerator: zero points, weights per channel, any scale."""
    return Device(
        name=name,
        soc=soc,
        tools=Fact(name.lower(), _SETUP),
        scale_type=Fact(4, f"{PRESETS}; {RUNTIME_OPTIONS}, runtime_options_onnx_qat_v2"),
        power_of_two=Fact(False, QUANTIZATION_DOC),
        asymmetric=Fact(True, _FEATURES),
        per_channel=Fact(True, _FEATURES),
        mixed_sign_matmul=Fact(True, f"{OPERATORS_DOC}, Gemm/MatMul"),
        lut=Fact(lut, _FEATURES),
        conv_3x3_stride_3=Fact(not conv_limits, _CONV),
        pad_wider_than_input=Fact(not conv_limits, _CONV),
        warnings=(_AXIS, _TRANSFORMERS) if lut else (_AXIS, _TRANSFORMERS, _NO_LUT),
    )


#: The table of devices. A new device is a new row, and a row in `hf_qat.config.targets.TARGETS`.
DEVICES: tuple[Device, ...] = (
    Device(
        name="TDA4VM",
        soc="J721E",
        tools=Fact("am68pa", _SETUP),
        scale_type=Fact(1, f"{PRESETS}; {RUNTIME_OPTIONS}, runtime_options_onnx_qat_v2_p2"),
        power_of_two=Fact(True, PRESETS),
        asymmetric=Fact(False, f"{QUANTIZATION_DOC}, section A.1 (AM68PA is another name of TDA4VM)"),
        per_channel=Fact(False, _FEATURES),
        mixed_sign_matmul=Fact(False, f"{OPERATORS_DOC}, Gemm/MatMul"),
        lut=Fact(True, _FEATURES),
        conv_3x3_stride_3=Fact(True, _CONV),
        pad_wider_than_input=Fact(True, _CONV),
        warnings=(_QDQ_OR_CLIP, _TRANSFORMERS),
    ),
    _second_generation("AM62A", "AM62A", lut=False, conv_limits=True),
    _second_generation("AM67A", "J722S", conv_limits=True),
    _second_generation("AM68A", "J721S2"),
    _second_generation("AM69A", "J784S4"),
)


def find_device(name: str) -> Device:
    """The device that a name or a part number stands for, in upper or lower case.

    Raises:
        ConfigError: no such device; the message lists all.
    """
    spellings = {spelling.lower(): device for device in DEVICES for spelling in (device.name, device.soc)}
    if isinstance(name, str) and name.lower() in spellings:
        return spellings[name.lower()]
    known = [device.name for device in DEVICES]
    raise ConfigError(
        f"{name!r} is no device that TIDL runs on.{did_you_mean(name, known)} Known devices: {', '.join(known)}."
    )
