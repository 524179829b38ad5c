"""How a checkpoint of either kind becomes a model again, in the two hooks that `from_pretrained` has for it.

Before the weights are read, the float model is prepared (and converted) on the meta device, as its config.json says.
Afterwards, codes get their shape back, and what transformers could not know is put right.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qat.checkpoints.stored_format import quantized_layers, restored, stored_shape
from hf_qat.checkpoints.validation import check_tensors, open_tensors
from hf_qat.config.checkpoint_info import CheckpointInfo, Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CaptureError, ConfigError, WeightsError
from hf_qat.graph.capture.capture import Parts
from hf_qat.graph.capture.meta_device import META, MetaCapture
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.fingerprint import first_difference
from hf_qat.graph.nodes import CONSTANT_PREFIX
from hf_qat.graph.one_at_a_time import TURN
from hf_qat.graph.plan import join_path
from hf_qat.model.conversion import swap_to_integer_modules
from hf_qat.model.finite import require_finite
from hf_qat.model.prepare import prepare_parts
from hf_qat.model.saved_config import keep_names, rebuild_inputs, rebuild_labelled_calls
from hf_qat.model.state import state_of
from hf_qat.model.state_dict import initialize_weight_scales
from hf_qat.quantization.class_swap import original_class
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingRestore:
    """What the rebuilding of a model before its weights are read leaves to be done afterwards.

    Attributes:
        codes: keys of the codes of the quantized layers.
        constants: path → value of the tensors that the graphs hold, which transformers overwrites as not stored.
        new_heads: key → shape of the tensors that the file has for another number of labels.
    """

    codes: set[str]
    constants: dict[str, Tensor]
    new_heads: dict[str, torch.Size]


def rebuild_before_loading(model: PreTrainedModel, config: QATConfig, files: list[str] | None) -> PendingRestore:
    """Prepare (and convert) a model on the meta device as its checkpoint says, in place, and look through the files.

    Args:
        model: as its class makes it, on the meta device.
        config: of the checkpoint.
        files: the safetensors files of the checkpoint.

    Raises:
        ConfigError: `config` does not say how to rebuild a model.
        WeightsError: the graph is another one than was saved, a file does not hold what the model needs, or codes are
            to serve another number of labels.
    """
    if config.checkpoint is None:
        raise ConfigError(
            "quantization_config has no entry 'checkpoint': the config.json was not written by save_pretrained of a "
            "prepared or converted model. Load the float model, and call prepare_qat(model, config)."
        )
    if files is None:
        raise WeightsError("a quantized model is loaded from a directory or a repository, not from a state dict.")
    saved = CheckpointInfo.from_dict(config.checkpoint)
    _require_trainable_for_other_labels(model, saved)
    if isinstance(model, CapturedModule):  # `type(prepared).from_pretrained(…)`, where the whole was captured
        model.__class__ = original_class(type(model))
    _leave_no_parameter_behind(model)
    _tie_weights(model)
    with open_tensors(files, str(getattr(model.config, "name_or_path", ""))) as stored:
        # transformers makes everything on the meta device in here; what a graph holds as constants has values.
        with torch.device("cpu"):
            with TURN, MetaCapture():
                recipe = config.with_checkpoint(None)
                modules = dict(model.named_modules(remove_duplicate=False))
                paths = [path for path in saved.operations if path in modules]  # another class has others
                calls = rebuild_labelled_calls(saved.labelled_calls)
                parts = Parts(recipe.excludes, paths, saved.stage is Stage.PREPARED, calls)
                _prepare_as_saved(model, recipe, saved, parts)
            _require_same_graph(model, saved)
            if saved.stage is Stage.CONVERTED:
                swap_to_integer_modules(model)
                _forget_ties_of_codes(model)
        layers = {join_path(path, "weight"): layer for path, layer in quantized_layers(model).items()}
        shapes = {key: stored_shape(layer) for key, layer in layers.items()}
        other_labels = saved.stage is Stage.PREPARED and saved.num_labels != _info(model).num_labels
        new_heads = check_tensors(model, stored, shapes, other_labels)
    return PendingRestore(set(layers), _constants(model), new_heads)


def _leave_no_parameter_behind(model: nn.Module) -> None:
    """All parameters to the meta device: `torch.Tensor(n)`, as some classes make one, takes no notice of a default."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.device != META:
                module._parameters[name] = nn.Parameter(value.detach().to(META), value.requires_grad)


def _tie_weights(model: PreTrainedModel) -> None:
    """Make one parameter of those that its class ties, as when it was saved: transformers does so after loading."""
    for key, source in model.all_tied_weights_keys.items():
        path, _, name = key.rpartition(".")
        model.get_submodule(path)._parameters[name] = model.get_parameter(source)


def _forget_ties_of_codes(model: PreTrainedModel) -> None:
    """Codes are no parameters, and a checkpoint holds those of each layer: transformers has nothing to tie."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = model.all_tied_weights_keys
    vars(model)["all_tied_weights_keys"] = {key: ties[key] for key in ties if {key, ties[key]} <= parameters}


def _require_trainable_for_other_labels(model: PreTrainedModel, saved: CheckpointInfo) -> None:
    labels = getattr(model.config, "num_labels", 0)
    if saved.stage is Stage.CONVERTED and saved.num_labels not in (0, labels):
        raise WeightsError(
            f"the checkpoint has integer codes for {saved.num_labels} labels, and num_labels is {labels}: codes learn "
            "no more. Load the float model, or what QATTrainer.save_model wrote, for that number, and train."
        )


def _prepare_as_saved(model: PreTrainedModel, recipe: QATConfig, saved: CheckpointInfo, parts: Parts) -> None:
    """Make the graphs of a checkpoint again.

    Raises:
        CaptureError: that fails.
        WeightsError: it fails, and the checkpoint is that of another class, which is why.
    """
    try:
        other_size = rebuild_inputs(saved.other_size) if saved.other_size else None
        prepare_parts(model, recipe, rebuild_inputs(saved.inputs), parts, other_size=other_size)
    except CaptureError as error:
        own = type(model).__name__
        if saved.model_class == own:
            raise
        raise WeightsError(
            f"the checkpoint was saved from {saved.model_class}, and {own} does not compute alike: load it by "
            f"{saved.model_class}, or by an auto class of its task. ({error})"
        ) from error


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the graphs hold, by path.

    Raises:
        WeightsError: the value of one depends on weights, which are not there yet.
    """
    constants = {
        path: buffer for path, buffer in model.named_buffers() if path.rpartition(".")[2].startswith(CONSTANT_PREFIX)
    }
    for path, value in constants.items():
        if value.device.type == "meta":
            raise WeightsError(
                f"{path}, a constant in the graph of {type(model).__name__}, cannot be computed before the weights "
                "are read, so from_pretrained cannot rebuild the model. Prepare the float model, and load_weights "
                "into it."
            )
    return constants


def _info(model: PreTrainedModel) -> CheckpointInfo:
    return CheckpointInfo.from_dict(model.config.quantization_config.checkpoint)


def _require_same_graph(model: PreTrainedModel, saved: CheckpointInfo) -> None:
    built = _info(model)
    difference = first_difference(saved.operations, built.operations)
    if difference is None:
        return
    raise WeightsError(
        f"the checkpoint holds the quantizers of another graph: {difference}. It was saved from {saved.model_class} "
        f"by transformers {saved.transformers_version} with torch {saved.torch_version}, and this is "
        f"{built.model_class} of transformers {built.transformers_version} with torch {built.torch_version}. Use the "
        "class and the versions that saved it; or prepare the float model anew."
    )


def restore_after_loading(model: PreTrainedModel, pending: PendingRestore) -> None:
    """Complete a rebuilt model once its weights are read, in place.

    Args:
        model: what `rebuild_before_loading` was given.
        pending: what it returned.

    Raises:
        NonFiniteError: a weight holds NaN or infinity.
    """
    for path, value in pending.constants.items():
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner)._buffers[name] = value.to(model.get_buffer(path).device)
    for layer in set(quantized_layers(model).values()):
        layer._buffers["weight"] = restored(layer, layer.codes)
    if pending.new_heads:
        _start_heads(model, pending.new_heads)
    require_finite(model, "load")
    keep_names(model)
    state = state_of(model)
    if state is not None and state.stage is Stage.CONVERTED:
        model.requires_grad_(False)
    else:
        detach_quantizer(model)


def detach_quantizer(model: PreTrainedModel) -> None:
    """Leave a prepared model as `prepare_qat` does; `attach_hf_quantizer` says why it has no quantizer."""
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("quantization_method", None)
    vars(model)["is_quantized"] = False


def _start_heads(model: PreTrainedModel, shapes: dict[str, torch.Size]) -> None:
    """Fresh weights for another number of labels; the ranges of what they compute are to be collected anew."""
    owners: dict[str, nn.Module] = {}
    for key, shape in shapes.items():
        path, _, name = key.rpartition(".")
        owner = owners[path] = model.get_submodule(path)
        old = getattr(owner, name)
        fresh = torch.zeros(shape, dtype=old.dtype, device=old.device)
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(fresh, requires_grad=old.requires_grad)
        else:
            owner._buffers[name] = fresh
        if isinstance(owner, FakeQuantize):  # of a weight, which is stored under another name if it is tied
            layer = path.rpartition(".")[0]
            owners[layer] = model.get_submodule(layer)
    _tie_weights(model)
    for owner in owners.values():
        if not isinstance(owner, FakeQuantize):
            model._init_weights(owner)
    for owner in owners.values():
        if isinstance(owner, QATLayer):
            for quantizer in fake_quantizers(owner).values():
                quantizer.observed.zero_()
            initialize_weight_scales(owner)
    logger.warning(
        "The checkpoint was saved with another number of labels. %s start from random weights: train, and calibrate "
        "the ranges again.",
        ", ".join(shapes),
    )
