"""Equalization: share out factors between layers so that all channels of a tensor make good use of its codes.

Multiply a channel of a layer's output by `s`, and divide by `s` what the next layer multiplies it with: in float that
is the same model (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", §4.1).
A tensor has one scale, so a channel whose values are small is rounded coarsely; to make it larger costs codes of the
weights that read it. The paper makes the ranges of the weights on both sides equal. Here the factors are those with
which rounding of activations and weights, taken for independent noise of `step² / 12`, comes to the least in what the
consumers put out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.channel_groups import ChannelGroup, channel_groups, groups_of
from hf_qat.model.analysis.noise import outputs_sqnr
from hf_qat.model.batches import run_batches
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.collectives import mean_over_ranks, min_over_ranks, synchronized_range
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec


logger = logging.get_logger(__name__)

#: Steps of Adam on log2 of the factors, and the rate of the first, from where it falls to 0 by a cosine.
STEPS, RATE = 60, 0.25

#: No factor is larger, nor smaller than its inverse.
LARGEST_FACTOR = 16.0

#: A channel that ReLU6 has not cut off may not come nearer to 6 than this share of it: other images have larger
#: values.
HEADROOM = 0.9

#: Batches whose channels are measured, and batches that tell whether it has done any good.
MEASURED_BATCHES, JUDGED_BATCHES = 4, 8


@dataclass
class ChannelStatistics:
    """Of a tensor, over all batches: (C,) each, per channel.

    Attributes:
        low, high: least and greatest value, not above and not below 0.
        power: mean square.
    """

    low: Tensor
    high: Tensor
    power: Tensor


def equalize(model: nn.Module, batches: Sequence[Inputs]) -> int:
    """Share out factors between the layers of a prepared model, in place; returns how many channels have one.

    In float the model computes what it did, but for values behind a ReLU6 that are larger than any in `batches`.
    Layers whose weights, or whose input's range, are frozen stay as they are.

    Collective: all ranks go by the statistics of all.

    Args:
        model: prepared; its ranges are to be collected afterwards.
        batches: of images, at least one.
    """
    groups = _free_groups(model)
    statistics = _measure(model, groups, batches)
    changed = 0
    for group in groups:
        if all(quantizer in statistics and quantizer.enabled for quantizer in group.quantizers):
            factors = _Noise(group, statistics).least()
            _scale(group, factors)
            changed += int((factors != 1.0).sum())
    return changed


def equalize_if_nearer(model: nn.Module, batches: Sequence[Inputs], collect: Callable[[], object]) -> bool:
    """Equalize a calibrated model, in place, unless its outputs come no nearer to those in float; returns whether.

    Args:
        model: prepared and calibrated.
        batches: of images, at least one.
        collect: collects all ranges anew.
    """
    if not _free_groups(model):
        return False
    tensors = [*model.parameters(), *model.buffers()]
    judged, before = batches[:JUDGED_BATCHES], [tensor.detach().clone() for tensor in tensors]
    nearness = outputs_sqnr(model, judged)
    if equalize(model, batches[:MEASURED_BATCHES]):
        collect()
        if (found := outputs_sqnr(model, judged)) > nearness:
            logger.info(f"Equalization: signal to noise of the outputs {nearness:.2f} dB before, {found:.2f} dB now.")
            return True
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    return False


def _free_groups(model: nn.Module) -> list[ChannelGroup]:
    return [group for group in channel_groups(model) if not any(quantizer.frozen for quantizer in group.quantizers)]


def _measure(
    model: nn.Module, groups: Iterable[ChannelGroup], batches: Sequence[Inputs]
) -> dict[FakeQuantize, ChannelStatistics]:
    """What passes the quantizers of all groups, in float."""
    found: dict[FakeQuantize, list[ChannelStatistics]] = {}
    axes = {quantizer: axis for group in groups for quantizer, axis in group.quantizers.items()}
    with fake_quant_disabled(model), _watching(axes, found):
        for _ in run_batches(model, batches[: min_over_ranks(len(batches))]):
            pass
    return {quantizer: _merged(parts) for quantizer, parts in found.items()}


@contextmanager
def _watching(axes: dict[FakeQuantize, int], found: dict[FakeQuantize, list[ChannelStatistics]]) -> Iterator[None]:
    def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, FakeQuantize)
        if not output.numel():
            return
        rows = output.float().movedim(axes[module], 0).flatten(1)
        low, high = rows.amin(1).clamp_max(0.0), rows.amax(1).clamp_min(0.0)
        found.setdefault(module, []).append(ChannelStatistics(low, high, rows.square().mean(1)))

    with ExitStack() as stack:
        for quantizer in axes:
            stack.enter_context(quantizer.register_forward_hook(watch))
        yield


def _merged(parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
    low = torch.stack([part.low for part in parts]).amin(0)
    high = torch.stack([part.high for part in parts]).amax(0)
    power = torch.stack([part.power for part in parts]).mean(0)
    return ChannelStatistics(*synchronized_range(low, high), mean_over_ranks(power))


class _Noise:
    """What rounding comes to in the outputs of a group's consumers, relative to their power."""

    def __init__(self, group: ChannelGroup, statistics: dict[FakeQuantize, ChannelStatistics]) -> None:
        self.tensors = [(quantizer.spec, statistics[quantizer]) for quantizer in group.quantizers]
        self.power = torch.stack([statistics[quantizer].power for quantizer in group.quantizers]).mean(0)
        self.readers = [_Reader(layer, self.power) for layer in group.consumers]
        self.writers = [_Writer(layer, self.power) for layer in group.producers if _shares_scale(layer)]
        self.most = _most(group, statistics)

    @torch.enable_grad()
    def least(self) -> Tensor:
        """The factors with the least noise that was found: (C,), 1 where a channel stays as it is."""
        least = torch.where(self.most == 0.0, self.most.new_zeros(()), -math.log2(LARGEST_FACTOR))
        exponents = torch.zeros_like(self.power, requires_grad=True)
        best, found = float(self(torch.ones_like(self.power))), torch.zeros_like(self.power)
        if best == 0.0:
            return torch.exp2(found)
        optimizer = torch.optim.Adam([exponents], RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            noise = self(torch.exp2(exponents))
            if float(noise.detach()) < best:
                best, found = float(noise.detach()), exponents.detach().clone()
            (exponents.grad,) = torch.autograd.grad(noise.log(), exponents)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                exponents.clamp_(least, self.most)
        return torch.exp2(found)

    def __call__(self, factors: Tensor) -> Tensor:
        """() noise with these factors, (C,)."""
        steps = torch.stack([_step(spec, of, factors) for spec, of in self.tensors])
        comes_in = steps.square().sum() / 12 + sum(writer.noise(factors) for writer in self.writers)
        total: Tensor = torch.stack([reader.noise(factors, comes_in) for reader in self.readers]).sum()
        return total


def _most(group: ChannelGroup, statistics: dict[FakeQuantize, ChannelStatistics]) -> Tensor:
    """log2 of the largest factors: (C,); 0 for a channel of zeros, and for one that is cut off or might be."""
    extent = torch.stack([statistics[q].high - statistics[q].low for q in group.quantizers]).amax(0)
    most = torch.full_like(extent, math.log2(LARGEST_FACTOR))
    if group.ceiling is not None:
        reached = torch.stack([statistics[quantizer].high for quantizer in group.clamped]).amax(0)
        room = torch.log2(HEADROOM * group.ceiling / reached.clamp_min(torch.finfo(torch.float32).tiny))
        most = torch.minimum(most, room.clamp_min(0.0))
    return torch.where(extent > 0, most, 0.0)


def _step(spec: QuantizerSpec, of: ChannelStatistics, factors: Tensor) -> Tensor:
    """() size of a step of a tensor's codes."""
    high, low = (of.high * factors).amax(), (of.low * factors).amin()
    if not spec.symmetric:
        return (high - low) / (spec.qmax - spec.qmin)
    upper = high / spec.qmax
    return torch.maximum(upper, low / spec.qmin) if spec.qmin < 0 else upper


def _shares_scale(layer: QATLayer) -> bool:
    """Whether the channels of its weight have one scale: else a factor changes nothing about how it is rounded."""
    return layer.weight_quantizer.enabled and layer.weight_quantizer.spec.axis is None


class _Writer:
    """A producer whose weight has one scale: how noise of its weight comes out, the same for each channel."""

    def __init__(self, layer: QATLayer, power: Tensor) -> None:
        weight = layer.float_weight().detach().flatten(1)
        self.largest, self.qmax = weight.abs().amax(1), float(layer.weight_quantizer.spec.qmax)
        # Of what it reads, the mean square is what it makes of it by weights that are taken for independent.
        self.heard = weight.shape[1] * float(power.sum() / weight.square().sum())

    def noise(self, factors: Tensor) -> Tensor:
        """() mean square."""
        return ((self.largest * factors).amax() / self.qmax).square() / 12 * self.heard


class _Reader:
    """A consumer: how noise of its input, and of its weights, comes out."""

    def __init__(self, layer: QATLayer, power: Tensor) -> None:
        spec, groups = layer.weight_quantizer.spec, groups_of(layer)
        weight = layer.float_weight().detach()
        weight = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        weight = weight.unflatten(0, (groups, -1))  # (groups, outputs, channels, places)
        self.shape, self.places = (groups, weight.shape[2]), weight.shape[3]
        self.largest, self.squares = weight.abs().amax(3), weight.square().sum((1, 3))
        self.power = power.view(self.shape)
        self.qmax, self.per_channel = float(spec.qmax), spec.axis is not None
        self.rounds = layer.weight_quantizer.enabled
        self.signal = (self.squares * self.power).sum().clamp_min(torch.finfo(torch.float32).tiny)

    def noise(self, factors: Tensor, activations: Tensor) -> Tensor:
        """() relative to the signal; `activations`, (), is the noise of each value that comes in."""
        of = factors.view(self.shape)
        total = activations * (self.squares / of.square()).sum()
        if self.rounds:
            steps = (self.largest / of.unsqueeze(1)).amax(2) / self.qmax
            steps = steps if self.per_channel else steps.amax().expand_as(steps)
            heard = (self.power * of.square()).sum(1)
            total = total + (steps.square().sum(1) * heard).sum() * self.places / 12
        relative: Tensor = total / self.signal
        return relative


@torch.no_grad()
def _scale(group: ChannelGroup, factors: Tensor) -> None:
    """Multiply what producers put out, divide what consumers read."""
    makers: list[Any] = [*group.norms, *(layer.batch_norm or layer for layer in group.producers)]
    for maker in makers:
        for parameter in (maker.weight, maker.bias):
            if parameter is not None:
                parameter.mul_(factors.to(parameter).view(-1, *[1] * (parameter.dim() - 1)))
    for layer in group.consumers:
        weight = layer.weight
        rows = weight.shape[0] // groups_of(layer)
        of = factors.to(weight).view(-1, weight.shape[1]).repeat_interleave(rows, 0)
        weight.div_(of.view(*of.shape, *[1] * (weight.dim() - 2)))
