"""Post-training calibration: ranges from data, without gradients, and a correction of biases.

The first resort before training. Bias correction: Nagel et al. 2019, §4.2 (the empirical form).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat.errors import CalibrationError
from hf_qat.graph.inputs import Inputs, as_call, device_of
from hf_qat.graph.modes import evaluating
from hf_qat.prepare import fake_quant_disabled, require_stage
from hf_qat.quantization.layers import QATLayer, qat_layers
from hf_qat.quantization.observers.distributed import least_of_ranks, rank_mean
from hf_qat.quantization.quantizer import fake_quantizers


Model = TypeVar("Model", bound=nn.Module)

#: Batches that bias correction averages over: a mean per channel needs far less data than a range.
BIAS_CORRECTION_BATCHES = 4


def calibrate(
    model: Model, batches: Iterable[Inputs], num_batches: int | None = None, bias_correction: bool = True
) -> Model:
    """Find the scales of a prepared model from data, in place.

    Args:
        model: prepared.
        batches: tensors, tuples or dicts, as forward takes them; labels in a dict are ignored. A data loader will do.
        num_batches: use at most so many.
        bias_correction: shift biases so that every layer's mean output is that of the float model.

    Returns:
        The same object.

    Raises:
        StageError: the model is not prepared.
        CalibrationError: no batch, or integers, NaN or infinities in one.
    """
    require_stage(model, "prepared", "calibrate")
    kept = _observe(model, islice(batches, num_batches))
    if bias_correction:
        correct_biases(model, kept)
    return model


def _observe(model: nn.Module, batches: Iterable[Inputs]) -> list[Inputs]:
    """One pass in float that collects every range; returns the first batches for whoever needs them again."""
    quantizers = fake_quantizers(model)
    layers = qat_layers(model)
    weights = {id(layer.weight_quantizer) for layer in layers.values()}
    activations = {path: q for path, q in quantizers.items() if id(q) not in weights and not q.frozen}
    for quantizer in activations.values():
        quantizer.start_observing()
    try:
        kept = _run_all(model, batches)
        for path, quantizer in activations.items():
            quantizer.finish_observing(path)
    finally:
        for quantizer in activations.values():
            quantizer.observer = None
    for layer in layers.values():
        if not layer.weight_quantizer.frozen:
            layer.initialize_scale()
            layer.weight_quantizer.observed.fill_(1)
    return kept


def _run_all(model: nn.Module, batches: Iterable[Inputs]) -> list[Inputs]:
    """Forward all batches in float; returns the first ones. Fails in all processes if it does in one: none waits."""
    kept: list[Inputs] = []
    failure: CalibrationError | None = None
    try:
        with fake_quant_disabled(model):
            for batch in _run(model, batches):
                if len(kept) < BIAS_CORRECTION_BATCHES:
                    kept.append(batch)
        if not kept:
            raise CalibrationError("calibrate got no batches: pass an iterable that yields at least one.")
    except CalibrationError as error:
        failure = error
    if not least_of_ranks(int(failure is None)):
        raise failure or CalibrationError("another process got no batch, or one that no range can come of: see there.")
    return kept


def _run(model: nn.Module, batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Forward each batch, in evaluation mode and without gradients; yields it afterwards."""
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for position, batch in enumerate(batches):
            args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, as_call(batch))
            _check_batch(position, [*args, *kwargs.values()])
            _check_call(model, position, args, kwargs)
            model(*args, **kwargs)
            yield batch


def _check_batch(position: int, values: list[object]) -> None:
    tensors = [value for value in values if isinstance(value, Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if tensors and not floating:
        raise CalibrationError(
            f"calibration batch {position} holds {tensors[0].dtype} only: give the floats that the model is trained "
            "on, that is the output of the image processor, not raw pixels."
        )
    for tensor in floating:
        if not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(f"calibration batch {position} holds NaN or infinity: no range can come of it.")


def _check_call(model: nn.Module, position: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CalibrationError(
            f"calibration batch {position} does not fit {type(model).__name__}.forward{signature}: {error}. Give what "
            "you would pass to the model, without labels: (images for images, labels in loader)."
        ) from error


@torch.no_grad()
def correct_biases(model: nn.Module, batches: list[Inputs]) -> None:
    """Shift each layer's bias by the difference of its mean output between the float and the quantized model.

    One pass in float records the mean of every call; then every batch runs quantized, and each layer is corrected on
    the way, so that the next one sees corrected inputs. A layer that is called several times is shifted by the mean of
    what its calls need. Layers without a bias or a batch norm stay as they are.

    Collective: all ranks correct by the means over all of them, on as many batches as the one that has fewest.
    """
    layers = qat_layers(model)
    batches = batches[: least_of_ranks(len(batches))]
    means: dict[str, list[Tensor]] = {path: [] for path in layers}

    def record(path: str, layer: QATLayer, output: Tensor) -> None:
        means[path].append(channel_mean(output, layer))

    with fake_quant_disabled(model), _hooked(layers, record):
        for _ in _run(model, batches):
            pass
    expected = {path: iter(of_calls) for path, of_calls in means.items()}
    shifts: dict[str, Tensor] = {}

    def correct(path: str, layer: QATLayer, output: Tensor) -> Tensor:
        shift = rank_mean(next(expected[path]) - channel_mean(output, layer))  # as of one batch of all ranks
        shifts[path] = shifts.get(path, torch.zeros_like(shift)) + shift / len(means[path])
        return output + _along_output(shift, output, layer)

    with _hooked(layers, correct):
        for _ in _run(model, batches):
            pass
    for path, shift in shifts.items():
        layers[path].shift_bias(shift)


@contextmanager
def _hooked(layers: dict[str, QATLayer], action: Callable[[str, QATLayer, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `action(path, layer, output)` after each layer; what it returns replaces the output."""
    shadowed = list(layers.items())
    for path, layer in shadowed:
        original = layer.compute

        def compute(
            x: Tensor, path: str = path, layer: QATLayer = layer, original: Callable[[Tensor], Tensor] = original
        ) -> Tensor:
            output = original(x)
            replaced = action(path, layer, output)
            return output if replaced is None else replaced

        object.__setattr__(layer, "compute", compute)
    try:
        yield
    finally:
        for _, layer in shadowed:
            object.__delattr__(layer, "compute")


def channel_mean(output: Tensor, layer: QATLayer) -> Tensor:
    """Mean over everything but the channels: (C,)."""
    channel = layer.channel_dim(output)
    return output.mean([d for d in range(output.dim()) if d != channel]) if output.dim() > 1 else output


def _along_output(per_channel: Tensor, output: Tensor, layer: QATLayer) -> Tensor:
    shape = [1] * output.dim()
    shape[layer.channel_dim(output)] = -1
    return per_channel.view(shape)
