"""What `load_state_dict` means on a prepared model.

A state dict without a single quantizer key is a float checkpoint: it loads strictly, and the ranges are to be
collected anew. One with all of them is a training checkpoint; one with some of them, but not all, is an error.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.errors import WeightsError
from hf_qat.graph.captured import captured_modules
from hf_qat.graph.nodes import fetch
from hf_qat.graph.weights import weights_in_graph
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from hf_qat.quantization.weight_quantizer import WeightQuantizer


#: Last parts of the keys of `FakeQuantize`.
QUANTIZER_STATE = frozenset({"log2_scale", "offset", "observed", "range_min", "range_max"})

#: Where the hook before loading tells the hook after it that the state dict is a float checkpoint.
_IS_FLOAT = "_hf_qat_loads_float"


def install_hooks(model: nn.Module) -> None:
    """Make `model.load_state_dict` follow the rule above, also when a module around `model` is loaded."""
    model.register_load_state_dict_pre_hook(_before_loading)
    model.register_load_state_dict_post_hook(_after_loading)


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    """What the fake quantizers of `model` add to its state dict, under the same keys; empty if it is not prepared."""
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FakeQuantize):
            state.update(module.state_dict(prefix=f"{path}."))
    return state


def is_float_state_dict(model: nn.Module, keys: Collection[str]) -> bool:
    """Whether `keys`, those of a state dict for the prepared `model`, are a float checkpoint's.

    Raises:
        WeightsError: some keys of quantizers are there, but not all that `model` has.
    """
    own = quantizer_state(model)
    absent = [key for key in own if key not in keys]
    names = model.state_dict().keys()
    stored = [key for key in keys if key in own or (key.rpartition(".")[2] in QUANTIZER_STATE and key not in names)]
    if absent and stored:
        raise WeightsError(
            f"the state dict has {len(own) - len(absent)} of the {len(own)} quantizer keys of the model and not, for "
            f"instance, {absent[0]}: it is a part of a checkpoint, or was saved from a model that was prepared with "
            "another config or by another version. Prepare the model as that one was; or remove all quantizer keys "
            f"(.{', .'.join(sorted(QUANTIZER_STATE))}) to load the float weights alone, and calibrate again."
        )
    return bool(absent)


def forget_ranges(model: nn.Module) -> None:
    """Start over, after new float weights: scales of weights from the weights, ranges of activations unknown."""
    for quantizer in fake_quantizers(model).values():
        quantizer.observed.zero_()
    initialize_weight_scales(model)


def initialize_weight_scales(model: nn.Module) -> None:
    """Set the scale of every weight so that it clips nothing: a start that costs no search; calibration refines it."""
    for layer in qat_layers(model).values():
        if layer.float_weight().device.type != "meta":
            layer.initialize_scale(replace(layer.weight_quantizer.spec, observer="minmax"))
    for captured in captured_modules(model).values():
        for path, weight in weights_in_graph(captured).items():
            quantizer: WeightQuantizer = fetch(captured, path)
            if weight.device.type != "meta":
                quantizer.initialize_scale(weight, replace(quantizer.spec, observer="minmax"))


@torch.no_grad()
def _before_loading(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Give a float checkpoint the quantizers' present state, which satisfies `strict`; nothing is loaded yet."""
    keys = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    is_float = bool(keys) and is_float_state_dict(model, keys)
    vars(model)[_IS_FLOAT] = is_float
    if is_float:
        state_dict.update({prefix + key: value.clone() for key, value in quantizer_state(model).items()})


def _after_loading(model: nn.Module, incompatible: object) -> None:
    if vars(model).pop(_IS_FLOAT, False):
        forget_ranges(model)
