"""`load_weights`: weights from anywhere into a float, prepared or converted model, with a report of what fitted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qat.checkpoints.key_names import native_names, without_attribute, without_wrapper
from hf_qat.checkpoints.sources import Source, name_of, read_weights
from hf_qat.checkpoints.stored_format import quantized_layers, restored, stored_shape
from hf_qat.errors import WeightsError, listed
from hf_qat.graph.plan import join_path
from hf_qat.model.state_dict import is_float_state_dict, quantizer_state


Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` found; all keys are those of the model, in its order, but `unexpected`.

    Attributes:
        source: where the weights came from.
        matched: keys that were loaded.
        missing: keys of the model that the source lacks; they keep their values.
        unexpected: keys of the source that the model lacks; they are left out.
        shapes: key → (shape in the source, shape in the model), where these differ; not loaded either.
        uncalibrated: keys of quantizers, where a float checkpoint went into a prepared model: no fault, but calibrate.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[Shape, Shape]]
    uncalibrated: tuple[str, ...] = ()

    @property
    def mismatched(self) -> tuple[str, ...]:
        """Keys of `shapes`."""
        return tuple(self.shapes)

    @property
    def complete(self) -> bool:
        """Whether source and model fit key by key."""
        return not (self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        """One line for each kind, with counts and names."""
        total = len(self.matched) + len(self.missing) + len(self.shapes)
        shapes = [f"{key} {theirs} instead of {own}" for key, (theirs, own) in self.shapes.items()]
        lines = [
            f"Weights from {self.source}:",
            f"  matched      {len(self.matched)} of {total}",
            f"  missing      {_counted(self.missing)}",
            f"  unexpected   {_counted(self.unexpected)}",
            f"  other shape  {_counted(shapes)}",
        ]
        if self.uncalibrated:
            lines.append(f"  quantizers without stored ranges: calibrate. {_counted(self.uncalibrated)}")
        return "\n".join(lines)


def _counted(names: Sequence[str]) -> str:
    """`2: a, b`; `0` for none."""
    return f"{len(names)}: {listed(names)}" if names else "0"


def load_weights(model: nn.Module, source: Source, strict: bool = False, verbose: bool = True) -> WeightsReport:
    """Load weights into `model`, in place, and say what fitted; if anything is refused, nothing is loaded at all.

    A wrapper's prefix before every key (`module.` of DataParallel, `_orig_mod.` of `torch.compile`) becomes that of
    the model, or none; the older names under which transformers saves are translated. Into a prepared model, a float
    checkpoint leaves the ranges of activations to be calibrated anew.

    Args:
        model: float, prepared or converted. A converted one takes the state dict of a converted one.
        source: a state dict; a file (safetensors, or what `torch.save` wrote of tensors alone); a directory with
            `model.safetensors` or its index; or the name of a Hub repository, looked for if there is no such path.
            What training scripts and Lightning put around a state dict, or before each key, is taken off. Of weights
            and their moving average, as timm's `state_dict_ema`, the weights are taken: hand in the other yourself.
        strict: refuse a source that does not fit key by key.
        verbose: print the report.

    Raises:
        WeightsError: the source cannot be read, or has nothing of the model; NaN or infinity in a weight; some keys of
            quantizers, but not all; float weights for a converted model, or integer codes for one that is not; with
            `strict`, anything missing, unexpected or of another shape.
    """
    state = read_weights(source)
    own = model.state_dict(keep_vars=True)
    state = without_wrapper(state, own)
    if isinstance(model, PreTrainedModel):
        state = native_names(model, state)
    state = without_attribute(state, own)
    codes = [join_path(path, name) for path in quantized_layers(model) for name in ("weight", "bias")]
    state = _shaped(model, state)
    _check_kinds(type(model).__name__, codes, own, state)
    is_float = is_float_state_dict(model, state)
    report = _compare(own, state, name_of(source), quantizer_state(model) if is_float else ())
    if not (report.matched or report.shapes):
        raise WeightsError(
            f"{report.source} has no tensor of {type(model).__name__}, under none of its names: its keys are "
            f"{listed(list(state))}, and those of the model {listed(list(own))}."
        )
    # Scales without their codes mean nothing, so a converted model is loaded as a whole.
    if (strict and not report.complete) or (codes and (report.missing or report.shapes)):
        raise WeightsError(f"the weights do not fit {type(model).__name__}, and none were loaded.\n{report}")
    matched = {key: state[key] for key in report.matched if key in state}
    _check_finite(matched)
    model.load_state_dict(matched, strict=False)
    if verbose:
        print(report)
    return report


def _compare(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, quantizers: Collection[str]
) -> WeightsReport:
    """What fits; a tensor that the model has under two names counts as there if the source has it under one."""
    shapes = {
        key: (tuple(state[key].shape), tuple(tensor.shape))
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    }
    loaded = {id(tensor) for key, tensor in own.items() if key in state and key not in shapes}
    matched = [key for key, tensor in own.items() if id(tensor) in loaded]
    return WeightsReport(
        source=source,
        matched=tuple(matched),
        missing=tuple(key for key in own if key not in {*matched, *shapes, *quantizers}),
        unexpected=tuple(key for key in state if key not in own),
        shapes=shapes,
        uncalibrated=tuple(quantizers),
    )


def _shaped(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with codes as a quantized checkpoint stores them (see `stored_format`) brought into their shape."""
    shaped = dict(state)
    for path, layer in quantized_layers(model).items():
        stored = state.get(key := join_path(path, "weight"))
        if stored is not None and not stored.is_floating_point() and tuple(stored.shape) == stored_shape(layer):
            shaped[key] = restored(layer, stored)
    return shaped


def _check_kinds(
    model_name: str, codes: Collection[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Refuse float weights for integer codes and the other way round: a cast would make garbage of either."""
    for key, tensor in state.items():
        present = own.get(key)
        if present is None or tensor.is_floating_point() == present.is_floating_point():
            continue
        if key in codes and tensor.is_floating_point():
            raise WeightsError(
                f"{model_name} is converted and {key}, of {tensor.dtype}, is no integer code: load float weights into "
                "the float or the prepared model, calibrate or train it, and convert again."
            )
        if present.is_floating_point():
            raise WeightsError(
                f"{key} is of {tensor.dtype} in the source and of {present.dtype} in {model_name}: the source was "
                "saved from a converted model. Load it into a converted one, or give the float checkpoint."
            )


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{key} holds NaN or infinity: the training that saved it had diverged.")
