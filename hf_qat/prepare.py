"""`prepare_qat`: capture, fuse, place; and the switches of a prepared model. Usable in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_qat.config import QATConfig
from hf_qat.errors import StageError
from hf_qat.graph.capture import capture
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.connect import connect
from hf_qat.graph.fingerprint import operations
from hf_qat.graph.fuse import fuse, layer_calls
from hf_qat.graph.inputs import Inputs, device_of, guess_inputs
from hf_qat.graph.place import place, weight_spec
from hf_qat.graph.rewrite import rewrite
from hf_qat.pretrained import announce_prepared
from hf_qat.quantization.layers import QATBatchNorm, QATLayer
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.synchronized_norm import synchronize_batch_norms
from hf_qat.state_dict import initialize_weight_scales, install_hooks


Model = TypeVar("Model", bound=nn.Module)

STATE = "_hf_qat_state"


@dataclass
class QATState:
    """What a prepared or converted model remembers of itself, under the attribute `_hf_qat_state`.

    Attributes:
        config: the recipe.
        stage: `"prepared"` or `"converted"`.
        captured: paths of the captured children, in the order of their first call.
    """

    config: QATConfig
    stage: str
    captured: list[str]


def state_of(model: nn.Module) -> QATState | None:
    """The state of a prepared or converted model, `None` for any other."""
    state: QATState | None = getattr(model, STATE, None)
    return state


def require_stage(model: nn.Module, stage: str, action: str) -> QATState:
    """The state of `model`, which must be at `stage` for `action`.

    Raises:
        StageError: it is not; the message says which call is missing.
    """
    state = state_of(model)
    if state is None:
        raise StageError(
            f"cannot {action}: {type(model).__name__} is a float model. Call prepare_qat(model, config) first."
        )
    if state.stage != stage:
        hint = "call convert(model) first" if state.stage == "prepared" else "it is for inference only; prepare a copy"
        raise StageError(f"cannot {action}: the model is {state.stage} already, not {stage}: {hint}.")
    return state


def captured_children(model: nn.Module) -> dict[str, CapturedModule]:
    """The captured children of a prepared or converted model, by path, in the order of their first call."""
    state = state_of(model)
    paths = [] if state is None else state.captured
    return {path: model.get_submodule(path) for path in paths}  # type: ignore[misc]


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
        announce_prepared(model, config, inputs, found)
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


@contextmanager
def fake_quant_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the prepared model computes in float, batch norm folded: to compare, or to debug.

    Raises:
        StageError: the model is not a prepared one.
    """
    require_stage(model, "prepared", "disable fake quantization")
    quantizers = list(fake_quantizers(model).values())
    before = [quantizer.enabled for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled


def freeze_batch_norm(model: Model, frozen: bool = True) -> Model:
    """Stop batch norms from using and updating batch statistics, whatever `train()` says; `frozen=False` undoes it.

    Raises:
        StageError: the model is not a prepared one.
    """
    require_stage(model, "prepared", "freeze batch norm")
    for module in model.modules():
        if isinstance(module, (QATLayer, QATBatchNorm)):
            module.batch_norm_frozen = frozen
    return model


def freeze_ranges(model: Model, frozen: bool = True) -> Model:
    """Stop scales and zero points from changing, by gradient or by running range; `frozen=False` undoes it.

    Raises:
        StageError: the model is not a prepared one.
    """
    require_stage(model, "prepared", "freeze ranges")
    for quantizer in fake_quantizers(model).values():
        quantizer.frozen = frozen
    return model
