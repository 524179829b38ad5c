"""How the integer codes of a converted model lie in its file.

They are stored under the name of the weight, flat: `[1, n]`, or `[n]` where the weight itself is `[1, n]`. No float
model has such a weight, so without `import hf_qat` transformers refuses the file instead of casting codes to float.
Codes of at most 4 bits lie two in a byte.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from hf_qat.graph.plan import join_path
from hf_qat.quantization.converted import QuantizedLayer
from hf_qat.quantization.packing import pack_nibbles, unpack_nibbles


#: Widths of which two codes fit in a byte.
PACKED_BITS = 4


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The converted layers of `model` by path; one that the model has under two names is there twice."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, QuantizedLayer)}


def stored_shape(layer: QuantizedLayer) -> tuple[int, ...]:
    """The shape under which the codes of `layer` are stored; never that of its weight."""
    count = layer.codes.numel()
    size = math.ceil(count / 2) if layer.weight_spec.bits <= PACKED_BITS else count
    return (size,) if layer.codes.dim() == 2 and layer.codes.shape[0] == 1 else (1, size)


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a converted model, with its codes as they are stored."""
    layers = quantized_layers(model)
    flat = {layer: _flat(layer) for layer in dict.fromkeys(layers.values())}
    return {**model.state_dict(), **{join_path(path, "weight"): flat[layer] for path, layer in layers.items()}}


def _flat(layer: QuantizedLayer) -> Tensor:
    codes = layer.codes.flatten()
    stored = pack_nibbles(codes) if layer.weight_spec.bits <= PACKED_BITS else codes
    return stored.reshape(stored_shape(layer))


def restored(layer: QuantizedLayer, stored: Tensor) -> Tensor:
    """The codes of `layer`, as they are stored, in the shape of its weight."""
    flat, shape = stored.flatten(), layer.weight_shape
    return (unpack_nibbles(flat, shape.numel()) if layer.weight_spec.bits <= PACKED_BITS else flat).reshape(shape)
