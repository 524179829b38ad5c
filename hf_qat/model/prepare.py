"""`prepare_qat`: capture, fuse, place; and the switches of a prepared model. Usable in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import StageError
from hf_qat.graph.capture.capture import capture
from hf_qat.graph.capture.inputs import Inputs, device_of, guess_inputs
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.fingerprint import operations
from hf_qat.graph.passes.connect import connect
from hf_qat.graph.passes.fuse import fuse, layer_calls
from hf_qat.graph.passes.place import place, weight_spec
from hf_qat.graph.passes.rewrite import rewrite
from hf_qat.model.saved_config import attach_quantization_config
from hf_qat.model.state import STATE, QATState, state_of
from hf_qat.model.state_dict import initialize_weight_scales, install_hooks
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.synchronized_norm import synchronize_batch_norms


Model = TypeVar("Model", bound=nn.Module)


def prepare_qat(model: Model, config: QATConfig | None = None, example_inputs: Inputs | None = None) -> Model:
    """Make `model` compute as the target will, in place: capture, fuse, place fake quantizers.

    Parameters stay the same objects under the same names, so an optimizer made before goes on working; the quantizers
    add their own state. Calibrate next, or train: scales start from the weights and need data for the activations.

    Args:
        model: any `nn.Module`, a Hugging Face one or not.
        config: the recipe; `QATConfig()` if left out.
        example_inputs: a tensor, a tuple or a dict, as forward takes it, batch first; guessed from the config of a
            Hugging Face vision model.

    Returns:
        The same object.

    Raises:
        StageError: prepared or converted already.
        ConfigError: a glob of `exclude` or `overrides` matches no module.
        CaptureError: forward cannot become a graph; the message names the module and the line.
    """
    state = state_of(model)
    if state is not None:
        raise StageError(f"{type(model).__name__} is {state.stage} already; prepare a copy of the float model.")
    config = QATConfig() if config is None else config
    config.check_globs([path for path, _ in model.named_modules() if path])
    inputs = guess_inputs(model) if example_inputs is None else example_inputs
    with _eager_attention(model):
        captured = capture(model, inputs, config.excludes)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.inplace = False  # it would overwrite what a quantizer has saved for its backward pass
    found = operations(captured)
    if config.sync_batch_norm:
        synchronize_batch_norms(model)
    for module in captured.values():
        rewrite(module)
    _fuse_all(captured, config)
    place(captured, config, config.excludes)
    connect(captured)
    device = device_of(model)
    for quantizer in fake_quantizers(model).values():
        if quantizer.log2_scale.device.type != "meta":  # that of a weight which is not read yet
            quantizer.to(device)
        quantizer.train(model.training)
    initialize_weight_scales(model)
    install_hooks(model)
    object.__setattr__(model, STATE, QATState(config, "prepared", list(captured)))
    if isinstance(model, PreTrainedModel):
        attach_quantization_config(model, config, inputs, found)
    return model


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Have products and softmax visible from now on; what fails inside leaves the model as it was."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    except Exception:
        model.set_attn_implementation(before)
        raise


def _fuse_all(captured: dict[str, CapturedModule], config: QATConfig) -> None:
    """Fuse every graph; the first and the last layer get `edge_bits`, where the target has them."""
    order = [(child, path) for child, module in captured.items() for _, path in layer_calls(module)]
    edges = {order[0], order[-1]} if order else set()
    callers: dict[nn.Module, set[str]] = {}
    for child, path in order:
        callers.setdefault(captured[child].get_submodule(path), set()).add(child)
    shared = {layer for layer, children in callers.items() if len(children) > 1}

    def spec_in(child: str) -> Callable[[str, int], QuantizerSpec]:
        def spec(path: str, axis: int) -> QuantizerSpec:
            scheme = config.schemes_for(join_path(child, path))[0]
            bits = config.target_spec.edge_bits
            overridden = scheme.bits != config.weight_scheme.bits
            if bits is not None and (child, path) in edges and not overridden:
                scheme = replace(scheme, bits=max(bits, scheme.bits))
            return weight_spec(scheme, axis)

        return spec

    for child, module in captured.items():
        fuse(module, lambda path, child=child: config.excludes(join_path(child, path)), spec_in(child), shared)  # type: ignore[misc]


def join_path(*parts: str) -> str:
    """Dotted path of the non-empty parts."""
    return ".".join(part for part in parts if part)
