"""`prepare_qat`: capture, plan, rewrite, fuse, place, connect. Usable in any training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CaptureError, ConfigError, StageError
from hf_qat.graph.capture.capture import Parts, capture
from hf_qat.graph.capture.inputs import Inputs, TwoSizes, device_of, guess_inputs
from hf_qat.graph.fingerprint import operations
from hf_qat.graph.one_at_a_time import TURN
from hf_qat.graph.passes.connect import connect
from hf_qat.graph.passes.fuse import fuse
from hf_qat.graph.passes.place import place
from hf_qat.graph.passes.rewrite import rewrite
from hf_qat.graph.passes.synchronize import synchronize
from hf_qat.model.eager import Model
from hf_qat.model.finite import require_finite
from hf_qat.model.further_calls import FurtherCalls
from hf_qat.model.plan import make_plan
from hf_qat.model.python_code import operations_in_python
from hf_qat.model.quantized_share import warn_of_float_layers
from hf_qat.model.rollback import unchanged_on_failure
from hf_qat.model.saved_config import attach_quantization_config
from hf_qat.model.state import STATE, QATState, quantized_parts
from hf_qat.model.state_dict import initialize_weight_scales, install_hooks
from hf_qat.quantization.freezable_norm import install_freezable_norm
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.quantization.synchronized_norm import synchronize_batch_norms


def prepare_qat(
    model: Model,
    config: QATConfig | None = None,
    example_inputs: Inputs | None = None,
    labels: Mapping[str, Any] | None = None,
    other_size: Inputs | None = None,
) -> Model:
    """Make `model` compute as the target will, in place: capture, plan, rewrite, fuse, place, connect.

    Parameters stay the same objects under the same names, so an optimizer made before goes on working; the quantizers
    add their own state. Calibrate next, or train: scales start from the weights and need data for the activations.

    Args:
        model: any `nn.Module`, a Hugging Face one or not.
        config: the recipe; `QATConfig()` if left out.
        example_inputs: a tensor, a tuple or a dict, as forward takes it, batch first; guessed from the config of a
            Hugging Face vision model. With labels among them, by their usual names, the model is also run as a step
            of training runs it: detectors call their parts otherwise then, with more queries, masks or axes.
        labels: further labels, by the names that forward has for them.
        other_size: example inputs again, with images of another height and another width: the model then takes any
            size that its own code does; what is the same in both is fixed. Exported files are of the size of
            `example_inputs`.

    Returns:
        The same object.

    Raises:
        StageError: prepared or converted already, or a part of it is.
        ConfigError: `config` is none, or a glob of `exclude` or `overrides` matches no module.
        NonFiniteError: a weight holds NaN or infinity; the message names it.
        CaptureError: forward cannot become a graph, the message names the module and the line; a parameter is not
            in float32; the model is compiled, or has adapters of peft.

    Whatever is raised, the model is left as it was.
    """
    _require_float(model)
    require_python(model)
    _require_never_compiled(model)
    _require_merged(model)
    _require_trainable(model)
    config = QATConfig() if config is None else require_config(config)
    config.check_globs([path for path, _ in model.named_modules() if path])
    inputs = guess_inputs(model) if example_inputs is None else example_inputs
    require_finite(model, "prepare")
    return prepare_parts(model, config, inputs, Parts(config.excludes), labels, other_size)


def require_config(config: object) -> QATConfig:
    """The config itself; `ConfigError` for what is none, such as the name of a target."""
    if not isinstance(config, QATConfig):
        given = repr(config) if isinstance(config, str) else f"a {type(config).__name__}"
        raise ConfigError(
            f"the recipe is {given}, and must be a QATConfig, such as QATConfig('int8'); example inputs come after it."
        )
    return config


def _require_float(model: nn.Module) -> None:
    """Refuse what is prepared or converted already, and a module around it: its quantizers would be captured again."""
    for path, module in quantized_parts(model).items():
        stage = vars(module)[STATE].stage
        if not path:
            raise StageError(f"{type(model).__name__} is {stage} already; prepare a copy of the float model.")
        raise StageError(
            f"{path} of {type(model).__name__} is {stage} already: prepare the whole with the float "
            f"{type(module).__name__} in its place, or leave what is around it in float."
        )


def require_python(model: nn.Module) -> None:
    """Refuse what has no Python code to look at.

    Raises:
        CaptureError: the model or a part of it is compiled or TorchScript.
    """
    for path, module in model.named_modules():
        what = f"{path} of {type(model).__name__}" if path else "the model"
        if isinstance(module, OptimizedModule):
            raise CaptureError(
                f"{what} is compiled: give it as it was before torch.compile (its `_orig_mod`), and compile what is "
                "prepared, or leave that to torch_compile=True of the TrainingArguments."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path or 'the model'} of {type(model).__name__} is TorchScript, which has no Python code to look at "
                "and no place for quantizers: prepare the model as it was before torch.jit.script, torch.jit.trace or "
                "torch.jit.load, with the same state dict."
            )


def _require_never_compiled(model: nn.Module) -> None:
    """`model.compile()` stays in the module, and its code would go on computing in float."""
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise CaptureError(
                f"{path or 'the model'} of {type(model).__name__} was compiled by compile(): prepare the model "
                "before, or a copy of it (copy.deepcopy leaves that behind), and compile what is prepared."
            )


def _require_merged(model: nn.Module) -> None:
    """Refuse adapters: a device would compute their layers beside those they adapt, and rounds both.

    What they save, and what they merge later, knows nothing of quantizers.
    """
    for path, module in model.named_modules():
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise CaptureError(
                f"{path or 'the model'} is a {type(module).__name__} of peft, which saves its adapters alone, without "
                "the quantizers of the rest: merge first, by model = model.merge_and_unload(), and prepare what that "
                "returns. (Where add_adapter has put them in: save them, load them into the float model by "
                "peft.PeftModel.from_pretrained, and merge that.)"
            )


def _require_trainable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise CaptureError(
                f"{name} of {type(model).__name__} was made in torch.inference_mode() and cannot be trained: make, "
                "load or copy the model outside of it."
            )
        # A single number takes on the type of what it meets, so a temperature in float64 (OneFormer's loss) is fine.
        alone = parameter.dim() == 0 and parameter.dtype == torch.float64
        if parameter.is_floating_point() and parameter.dtype != torch.float32 and not alone:
            raise CaptureError(
                f"{name} of {type(model).__name__} is {parameter.dtype}, and scales are found and trained in float32: "
                "call model.float() before prepare_qat. For mixed precision, train under torch.autocast."
            )


def prepare_parts(
    model: Model,
    config: QATConfig,
    inputs: Inputs,
    parts: Parts,
    labels: Mapping[str, Any] | None = None,
    other_size: Inputs | None = None,
) -> Model:
    """`prepare_qat`, for a checkpoint that says which parts are captured.

    Raises:
        CaptureError: one of them cannot become a graph.
    """
    # Scales that are made in inference mode could not be trained.
    with TURN, unchanged_on_failure(model), torch.inference_mode(False):
        _prepare(model, config, inputs, parts, labels, other_size)
    return model


def _prepare(
    model: nn.Module,
    config: QATConfig,
    inputs: Inputs,
    parts: Parts,
    labels: Mapping[str, Any] | None,
    other_size: Inputs | None,
) -> None:
    """The passes, in order; what one raises leaves the model half changed."""
    _use_eager_attention(model)
    shown = inputs if other_size is None else TwoSizes(inputs, other_size)
    further_calls = FurtherCalls.of(model, config, shown)
    captured = capture(model, shown, parts, labels)
    in_python = operations_in_python(model, captured, inputs, parts.excluded)
    plan = make_plan(model, captured, config, inputs)
    found = operations(captured)
    _drop_out_of_place(model)
    if config.sync_batch_norm:
        synchronize_batch_norms(model)

    rewrite(captured)
    fuse(captured, plan)
    place(captured, plan)
    connect(captured)

    _make_norms_freezable(model)
    _detach_computed_weights(model)
    _follow_model(model, config)
    _freeze_quantizers_of_frozen_parts(model)
    for module in captured.values():
        synchronize(module, module.graphs)
        module.remember_places()
        module.saves_memory = config.save_memory
        object.__setattr__(module, "capture_call", further_calls)
    initialize_weight_scales(model)
    install_hooks(model)
    object.__setattr__(model, STATE, QATState(config, Stage.PREPARED, list(captured), in_python))
    if isinstance(model, PreTrainedModel):
        attach_quantization_config(model, config, inputs, found, other_size)
    warn_of_float_layers(model)


def _use_eager_attention(model: nn.Module) -> None:
    """Have products and softmax visible from now on."""
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager")


def _drop_out_of_place(model: nn.Module) -> None:
    """Dropout in place would overwrite what a quantizer has saved for its backward pass."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.inplace = False


def _make_norms_freezable(model: nn.Module) -> None:
    """All batch norms can be frozen: those, too, that no graph calls, as of an excluded child."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, QATLayer):
            install_freezable_norm(module)


def _detach_computed_weights(model: nn.Module) -> None:
    """Hooks of weight norm and pruning keep the weight of the latest call, with its history, which cannot be copied.

    A graph computes its own and calls no hook any more, so that it would stay for good.
    """
    for module in model.modules():
        computed = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
        if module._forward_pre_hooks:
            vars(module).update({name: value.detach() for name, value in computed})


def _follow_model(model: nn.Module, config: QATConfig) -> None:
    """Bring the quantizers to the device and into the mode of the model; tell them where they are, and their rate."""
    device = device_of(model)
    for path, quantizer in fake_quantizers(model).items():
        quantizer.path, quantizer.lr_multiplier = path, config.scale_lr_multiplier
        if quantizer.log2_scale.device.type != "meta":  # that of a weight which is not read yet
            quantizer.to(device)
        quantizer.train(model.training)


def _freeze_quantizers_of_frozen_parts(model: nn.Module) -> None:
    """No scale learns where nothing else does: a frozen backbone stays what it was, and needs no backward pass.

    A quantizer belongs to the module that it is registered in, or to the nearest one around it that has parameters.
    What the user unfreezes later by `requires_grad_` gets its scales back.
    """
    quantizers = fake_quantizers(model)
    ours = {id(parameter) for quantizer in quantizers.values() for parameter in quantizer.parameters()}
    for path, quantizer in quantizers.items():
        own: list[nn.Parameter] = []
        while path and not own:
            path = path.rpartition(".")[0]
            own = [parameter for parameter in model.get_submodule(path).parameters() if id(parameter) not in ours]
        if own and not any(parameter.requires_grad for parameter in own):
            quantizer.requires_grad_(False)
