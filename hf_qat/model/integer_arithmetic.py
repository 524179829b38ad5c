"""Let a converted model compute as integer kernels do, ONNX Runtime's `QLinearConv` and `QGemm` for instance."""

from __future__ import annotations

from hf_qat.config.checkpoint_info import Stage
from hf_qat.graph.passes.connect import input_quantizers, output_quantizers
from hf_qat.model.eager import Model
from hf_qat.model.state import captured_children, require_stage
from hf_qat.quantization.converted import QuantizeDequantize, QuantizedLayer


def compute_in_integers(model: Model, enabled: bool = True) -> Model:
    """Switch the layers of a converted model to integer arithmetic, in place, or back.

    A convolution or linear layer between two quantizers then sums up products of codes and its int32 bias exactly,
    and takes that to codes of the output by one float32 factor, `s_in * s_w / s_out`, and one rounding, half to even.
    The codes are those of ONNX Runtime's integer kernels; dequantized weights in float32, the default, now and then
    round a near-tie the other way. It takes several times as long. Layers without a quantizer on either side, and all
    other operations, compute as before, and what is exported is the same.

    Args:
        model: converted, by `convert` or by `from_pretrained`.
        enabled: `False` switches back.

    Returns:
        The same object.

    Raises:
        StageError: the model is not a converted one.
    """
    require_stage(model, Stage.CONVERTED, "compute in integers")
    captured = captured_children(model)
    sources = input_quantizers(captured, QuantizedLayer, QuantizeDequantize)
    targets = output_quantizers(captured, QuantizedLayer, QuantizeDequantize)
    for layer in sources.keys() & targets.keys():
        layer.set_quantizers((sources[layer], targets[layer]) if enabled else None)
    return model
