"""Bias correction: Nagel et al. 2019, section 4.2, the empirical form."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_qat.errors import listed
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.progress import progress
from hf_qat.model.batches import run_batches
from hf_qat.model.computing import Compute, computing_by
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.collectives import mean_over_ranks, min_over_ranks
from hf_qat.quantization.fake_quantize import along
from hf_qat.quantization.layers import CORRECTED, QATLayer, qat_layers


logger = logging.getLogger(__name__)

#: Batches that bias correction averages over: a mean per channel needs far less data than a range.
BIAS_CORRECTION_BATCHES = 4


def shift_biases(shifts: Mapping[QATLayer, Tensor]) -> None:
    """Add (C,) to the bias of each layer, in place; `corrections_taken_back` undoes it."""
    for layer, shift in shifts.items():
        before = _copy(layer.shifted_bias())
        layer.shift_bias(shift)
        layer.__dict__[CORRECTED] = before, _copy(layer.shifted_bias())


def remember_biases(model: nn.Module) -> None:
    """Note that biases are those of the float model, where nothing was added to them yet."""
    for layer in qat_layers(model).values():
        bias = layer.shifted_bias()
        if bias is not None and CORRECTED not in vars(layer):
            layer.__dict__[CORRECTED] = _copy(bias), _copy(bias)


def are_perhaps_corrected(model: nn.Module) -> bool:
    """Whether the model came with ranges, as of a checkpoint, which has corrected biases alone: with no way back.

    A second correction would be added to the first.
    """
    layers = qat_layers(model).values()
    came_with_ranges = any(int(layer.weight_quantizer.observed) for layer in layers)
    return came_with_ranges and not any(CORRECTED in vars(layer) for layer in layers)


@contextmanager
def corrections_taken_back(model: nn.Module) -> Iterator[None]:
    """Take back what an earlier calibration has added to biases, where nothing has changed them since.

    Else the model in float, which the next correction goes by, would be off by just that. An error inside, and all is
    as it was.
    """
    taken = _take_back(layer for layer in qat_layers(model).values() if not _is_frozen(layer.shifted_bias()))
    try:
        yield
    except BaseException:
        _put_back(taken)
        raise


@contextmanager
def uncorrected(model: nn.Module) -> Iterator[None]:
    """Inside, biases are those of the float model: as before calibration, where nothing has changed them since."""
    taken = _take_back(qat_layers(model).values())
    try:
        yield
    finally:
        _put_back(taken)


def _take_back(layers: Iterable[QATLayer]) -> dict[QATLayer, tuple[Tensor, Tensor]]:
    """Undo `shift_biases`; returns what was known of the biases."""
    taken = {}
    for layer in layers:
        bias, known = layer.shifted_bias(), layer.__dict__.pop(CORRECTED, None)
        if bias is not None and known is not None and _is(bias, known[1]):
            taken[layer] = known
            _write(bias, known[0])
    return taken


def _put_back(taken: Mapping[QATLayer, tuple[Tensor, Tensor]]) -> None:
    for layer, known in taken.items():
        bias = layer.shifted_bias()
        if bias is not None and _is(bias, known[0]):
            _write(bias, known[1])
            layer.__dict__[CORRECTED] = known


def _is_frozen(bias: Tensor | None) -> bool:
    return isinstance(bias, nn.Parameter) and not bias.requires_grad


def _copy(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias.detach().clone()


def _is(bias: Tensor, value: Tensor) -> bool:
    split_by_fsdp = isinstance(bias, DTensor)  # it stays as it is
    return not split_by_fsdp and torch.equal(bias.detach(), value.to(bias))


@torch.no_grad()
def _write(bias: Tensor, value: Tensor) -> None:
    bias.copy_(value)


@torch.no_grad()
def bias_shifts(model: nn.Module, batches: list[Inputs]) -> dict[QATLayer, Tensor]:
    """By how much each layer's mean output differs between the float and the quantized model: (C,).

    One pass in float records the mean of every call; then every batch runs quantized, and each layer is corrected on
    the way, so that the next one sees corrected inputs. A layer that is called several times is shifted by the mean of
    what its calls need. Layers without a bias, of their own or of a batch norm, stay as they are, and so do those
    whose bias is another layer's as well, or a parameter that does not require gradients, which are logged: what they
    are off by, the layers after them make up for.

    Collective: all ranks correct by the means over all of them, on as many batches as the one that has fewest.
    """
    layers = _with_free_biases(qat_layers(model))
    batches = batches[: min_over_ranks(len(batches))]
    means: dict[str, list[Tensor]] = {path: [] for path in layers}

    def record(path: str, layer: QATLayer, output: Tensor) -> None:
        means[path].append(channel_mean(output, layer))

    with fake_quant_disabled(model), _hooked(layers, record):
        _run(model, batches, "Correcting biases: in float")
    expected = {path: iter(of_calls) for path, of_calls in means.items()}
    shifts: dict[str, Tensor] = {}

    def correct(path: str, layer: QATLayer, output: Tensor) -> Tensor:
        difference = next(expected[path]) - channel_mean(output, layer)
        difference = torch.where(difference.isnan(), 0.0, difference)  # the mean of nothing: no query, no box selected
        shift = mean_over_ranks(difference)  # as of one batch of all ranks
        shifts[path] = shifts.get(path, torch.zeros_like(shift)) + shift / len(means[path])
        return output + along(shift, output, layer.channel_dim(output))

    with _hooked(layers, correct):
        _run(model, batches, "Correcting biases: quantized")
    return {layers[path]: shift for path, shift in shifts.items()}


def _run(model: nn.Module, batches: list[Inputs], what: str) -> None:
    with progress(what, len(batches), "batch") as bar:
        for _ in run_batches(model, batches):
            bar.update()


def _with_free_biases(layers: dict[str, QATLayer]) -> dict[str, QATLayer]:
    """Those whose bias can be shifted; layers after the others are to see what these put out in the end, too."""
    biases = {path: bias for path, layer in layers.items() if (bias := layer.shifted_bias()) is not None}
    owners = Counter(map(id, biases.values()))
    frozen = [path for path, bias in biases.items() if _is_frozen(bias)]
    if frozen:
        logger.info(
            "Bias correction leaves %d layers alone, whose biases do not require gradients: %s.",
            len(frozen),
            listed(frozen),
        )
    return {path: layers[path] for path, bias in biases.items() if path not in frozen and owners[id(bias)] == 1}


def _hooked(
    layers: dict[str, QATLayer], action: Callable[[str, QATLayer, Tensor], Tensor | None]
) -> AbstractContextManager[None]:
    """Inside, `action(path, layer, output)` is called after each layer; what it returns replaces the output."""
    paths = {layer: path for path, layer in layers.items()}

    def change(layer: QATLayer, original: Compute) -> Compute:
        def compute(x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
            output = original(x, arguments)
            replaced = action(paths[layer], layer, output)
            return output if replaced is None else replaced

        return compute

    return computing_by(paths, change)


def channel_mean(output: Tensor, layer: QATLayer) -> Tensor:
    """Mean over everything but the channels: (C,)."""
    channel = layer.channel_dim(output)
    return output.mean([d for d in range(output.dim()) if d != channel]) if output.dim() > 1 else output
