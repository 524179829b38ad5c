"""What a Hugging Face model is told of its quantization, so that its own `save_pretrained` writes all of it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from hf_qat.config.checkpoint_info import CheckpointInfo, Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CaptureError, ConfigError
from hf_qat.graph.capture.inputs import Inputs, as_call
from hf_qat.graph.captured import CapturedModule
from hf_qat.graph.fingerprint import Operations, fingerprint
from hf_qat.model.state import captured_children


logger = logging.getLogger(__name__)


#: Batch size of the described inputs; capture takes its own anyway.
BATCH = 2

#: What is believed of a config.json: constants in the graph are made at these sizes before a weight is read.
MAX_DIMENSIONS, MAX_ELEMENTS = 8, 2**28


def attach_quantization_config(
    model: PreTrainedModel,
    config: QATConfig,
    inputs: Inputs,
    captured: Operations,
    other_size: Inputs | None = None,
) -> None:
    """Make `model.save_pretrained` write a training checkpoint.

    The model gets a `config` of its own: other models may share the one it was made from, and are not quantized.

    Args:
        model: prepared.
        config: the recipe.
        inputs: what it was captured with.
        captured: its operations before fusion.
        other_size: inputs with images of another size, if it was captured with such, too.

    Raises:
        CaptureError: the inputs hold something that JSON cannot.
    """
    info = CheckpointInfo(
        stage=Stage.PREPARED,
        model_class=type(model).__name__,
        num_labels=int(getattr(model.config, "num_labels", 0)),
        inputs=describe_inputs(inputs),
        operations={path: list(lines) for path, lines in captured.items()},
        fingerprint=fingerprint(captured),
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
        labelled_calls=describe_labelled_calls(captured_children(model)),
        other_size=[] if other_size is None else describe_inputs(other_size),
    )
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            vars(module)["config"] = own
    own.quantization_config = config.with_checkpoint(info.to_dict())
    keep_names(model)
    _separate_shared_tensors(model)


def keep_names(model: PreTrainedModel) -> None:
    """Make `save_pretrained` write the names that the model has.

    It would otherwise translate them into those of older releases, which a Trainer that resumes loads as they are, and
    drops. Under the model's own names, `from_pretrained` finds everything.
    """
    vars(model)["_weight_conversions"] = []


def attach_hf_quantizer(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write a quantized checkpoint.

    The quantizer that `import hf_qat` has registered with transformers does it. A prepared model has none: with one,
    `save_pretrained` would ignore the state dict that a distributed Trainer hands it.
    """
    config = model.config.quantization_config
    config = config.with_checkpoint({**config.checkpoint, "stage": Stage.CONVERTED.value})
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    vars(model)["is_quantized"] = True
    _separate_shared_tensors(model)


def _separate_shared_tensors(model: PreTrainedModel) -> None:
    """Write what quantization has added to a module with two names under both of them, as two tensors.

    Safetensors holds no tensor twice, and which of a model's own tensors are one, its class declares to transformers.
    """
    first: dict[int, str] = {}
    again = []
    for key, tensor in model.state_dict(keep_vars=True).items():
        known = first.setdefault(id(tensor), key)
        if known != key and not {key, known} & model.all_tied_weights_keys.keys():
            again.append(key)
    if again:
        model.register_state_dict_post_hook(partial(_copy_tensors, keys=again))


def _copy_tensors(model: object, state_dict: dict[str, Any], prefix: str, *_: object, keys: list[str]) -> None:
    for key in keys:
        if prefix + key in state_dict:
            state_dict[prefix + key] = state_dict[prefix + key].detach().clone()


def describe_inputs(inputs: Inputs) -> list[Any]:
    """Example inputs as JSON: `[args, kwargs]`, with each tensor as its shape (at batch size 2) and dtype.

    Raises:
        CaptureError: a value that JSON cannot hold.
    """
    args, kwargs = as_call(inputs)
    return [_describe(list(args)), _describe(kwargs)]


def describe_labelled_calls(captured: Mapping[str, CapturedModule]) -> dict[str, list[Any]]:
    """How labels make training call the captured children, as JSON: nobody can see it before the weights are read.

    Returns:
        Path of the child → `[training, [[args, kwargs], [args, kwargs]]]` for each such graph: the mode, and two calls
        of different sizes. A call that JSON cannot hold is left out.
    """
    described: dict[str, list[Any]] = {}
    for path, module in captured.items():
        for graph in module.graphs:
            try:
                calls = [
                    [_describe(list(args), None), _describe(kwargs, None)] for args, kwargs in graph.labelled_calls
                ]
            except CaptureError as error:
                logger.debug("A call of %s is not saved (%s).", path, error)
                continue
            if calls:
                described.setdefault(path, []).append([graph.training, calls])
    return described


def rebuild_labelled_calls(description: Mapping[str, Any]) -> dict[str, list[tuple[bool, Any]]]:
    """The calls that `describe_labelled_calls` wrote down, on the meta device.

    Raises:
        ConfigError: no such description, or a size beyond all reason.
    """
    rebuilt: dict[str, list[tuple[bool, Any]]] = {}
    for path, rows in description.items():
        try:
            rebuilt[path] = [
                (bool(mode), [(_rebuild(args), _rebuild(kw)) for args, kw in calls]) for mode, calls in rows
            ]
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"checkpoint['labelled_calls'][{path!r}] describes no calls: {error}.") from error
        pairs = [pair for _, calls in rebuilt[path] for pair in calls]
        if not all(isinstance(args, list) and isinstance(kwargs, dict) for args, kwargs in pairs):
            raise ConfigError(f"checkpoint['labelled_calls'][{path!r}] must hold pairs of args and kwargs.")
        for _, kwargs in pairs:
            _require_arguments("labelled_calls", kwargs)
    return rebuilt


def _describe(value: Any, batch: int | None = BATCH) -> Any:
    """As JSON; tensors have `batch` for their first axis, unless it is `None`."""
    if isinstance(value, Tensor):
        shape = value.shape if batch is None or not value.dim() else [batch, *value.shape[1:]]
        return {"tensor": [int(n) for n in shape], "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _describe(item, batch) for key, item in value.items()}}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_describe(item, batch) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CaptureError(
        f"example_inputs hold a {type(value).__name__}, which config.json cannot: pass tensors, numbers and strings."
    )


def rebuild_inputs(description: list[Any]) -> dict[str, Any] | tuple[Any, ...]:
    """Example inputs on the meta device, of the shapes that `describe_inputs` wrote down.

    Raises:
        ConfigError: no such description, or a size beyond all reason.
    """
    if len(description) != 2:
        raise ConfigError(f"checkpoint['inputs'] must be [args, kwargs], not {description!r}.")
    args, kwargs = (_rebuild(part) for part in description)
    if not isinstance(args, list) or not isinstance(kwargs, dict) or bool(args) == bool(kwargs):
        raise ConfigError(f"checkpoint['inputs'] must hold either args or kwargs, not {description!r}.")
    _require_arguments("inputs", kwargs)
    return kwargs or tuple(args)


def _require_arguments(entry: str, kwargs: Mapping[str, Any]) -> None:
    """Quantizers are named after arguments, and code is made with their names."""
    for name in kwargs:
        if not name.isidentifier():
            raise ConfigError(f"checkpoint[{entry!r}]: {name!r} is no name of an argument.")


def _rebuild(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuild(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dict"} and isinstance(value["dict"], dict):
        return {key: _rebuild(item) for key, item in value["dict"].items()}
    shape, dtype = value.get("tensor"), getattr(torch, str(value.get("dtype")), None)
    if value.keys() != {"tensor", "dtype"} or not isinstance(shape, list) or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"checkpoint['inputs']: {value!r} describes no tensor.")
    sizes_fit = all(type(n) is int and 0 < n for n in shape) and len(shape) <= MAX_DIMENSIONS
    if not sizes_fit or math.prod(shape) > MAX_ELEMENTS:
        raise ConfigError(f"checkpoint['inputs']: {shape!r} is no shape of an example input.")
    return torch.empty(shape, dtype=dtype, device="meta")
