"""Reconstruction: choose codes, scales and biases so that every quantized tensor comes out as in the float model.

What is learned, from images without labels: which of its two nearest codes each weight gets (AdaRound, Nagel et al.
2020), the scales and offsets of activations (LSQ, Esser et al. 2020), and biases. All layers learn together, as those
of one block do in BRECQ (Li et al. 2021): each gets its input from the quantized layers before it, and the error is
measured wherever a value is quantized, against the float model on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_qat.graph.capture.inputs import Inputs, device_of
from hf_qat.graph.capture.modes import evaluating
from hf_qat.graph.progress import progress
from hf_qat.model.batches import call_of
from hf_qat.model.computing import Compute, computing_by
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.collectives import mean_over_ranks
from hf_qat.quantization.layers import QATLayer, qat_layers
from hf_qat.quantization.learned_rounding import LearnedRounding
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.quantization.weight_quantizer import WeightQuantizer


logger = logging.get_logger(__name__)

#: Steps of the optimizer, one batch each.
STEPS = 600

#: Rates of Adam at the first step, from where they fall to 0 by a cosine: of positions between two codes, of scales
#: (log2) and offsets, and of biases, in units of the standard deviation of what the layer puts out.
ROUNDING_RATE, SCALE_RATE, BIAS_RATE = 1e-2, 5e-3, 3e-3

#: Batches by which it is judged whether anything was gained.
JUDGED_BATCHES = 8


def reconstruct(model: nn.Module, batches: Sequence[Inputs], biases: bool = True, seed: int = 0) -> None:
    """Learn, in place, what makes the quantized model compute what the float model does.

    Weights, scales and biases that are frozen or do not require gradients stay as they are; and so do all, if in the
    end the error is no less than it was.

    Collective: all ranks learn alike, each from its own batches.

    Args:
        model: prepared and calibrated; batch norms go by their running statistics meanwhile.
        batches: of images, at least one.
        biases: learn them, too.
        seed: of the order of the batches.
    """
    student = _Student(model, biases)
    if not student.parameters():
        return
    with evaluating(model), student.collecting():
        student.measure_outputs(batches[0])
        before = student.judge(batches[:JUDGED_BATCHES])
        _learn(student, batches, torch.Generator().manual_seed(seed))
        after = student.judge(batches[:JUDGED_BATCHES])
    if after < before:
        changed = student.write()
        logger.info(f"Reconstruction: {changed} weights have other codes; error {before:.4g} before, {after:.4g} now.")
    else:
        student.restore_scales()
        logger.info(f"Reconstruction gains nothing: error {before:.4g} before, {after:.4g} afterwards. All stays.")


class _Student:
    """The quantized model with what it learns, beside the float model: that is the model without quantizers."""

    def __init__(self, model: nn.Module, biases: bool) -> None:
        self.model = model
        layers = qat_layers(model).values()
        weights = {id(layer.weight_quantizer) for layer in layers}
        self.activations = [
            quantizer
            for quantizer in fake_quantizers(model).values()
            if quantizer.enabled and id(quantizer) not in weights and not isinstance(quantizer, WeightQuantizer)
        ]
        learning = [layer for layer in layers if layer.weight_quantizer.enabled and layer.weight.requires_grad]
        self.rounding = LearnedRounding(learning) if learning else None
        self.shifts = {layer: _zeros(layer) for layer in learning if biases and _learns(layer.shifted_bias())}
        on = [quantizer for quantizer in self.activations if quantizer.learned and not quantizer.frozen]
        self.scales = [parameter for quantizer in on for parameter in quantizer.parameters() if _learns(parameter)]
        self.first_scales = [scale.detach().clone() for scale in self.scales]
        self.units: dict[QATLayer, Tensor] = {}
        self.outputs: list[Tensor] = []

    def parameters(self) -> list[dict[str, Any]]:
        """Groups for an optimizer, those that are not empty."""
        positions = [] if self.rounding is None else [self.rounding.position]
        shifts = list(self.shifts.values())
        groups = ((positions, ROUNDING_RATE), (self.scales, SCALE_RATE), (shifts, BIAS_RATE))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, what quantizers put out is collected, in the order of their calls."""
        handles = [quantizer.register_forward_hook(self._collect) for quantizer in self.activations]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _collect(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.outputs.append(output)

    def _run(self, batch: Inputs) -> list[Tensor]:
        args, kwargs = call_of(batch, device_of(self.model))
        self.model(*args, **kwargs)
        collected, self.outputs = self.outputs, []
        return collected

    @torch.no_grad()
    def measure_outputs(self, batch: Inputs) -> None:
        """Find the unit of each layer's bias: the standard deviation of its output, in float."""

        def change(layer: QATLayer, original: Compute) -> Compute:
            def compute(x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
                output = original(x, arguments)
                self.units[layer] = mean_over_ranks(output.std(correction=0))
                return output

            return compute

        with fake_quant_disabled(self.model), computing_by(self.shifts, change):
            self._run(batch)

    def error(self, batch: Inputs) -> Tensor:
        """Mean over all quantized tensors of the squared error, relative to the variance in float."""
        with torch.no_grad(), fake_quant_disabled(self.model):
            wanted = self._run(batch)
        with computing_by(self.rounding.layers if self.rounding else (), self._change()):
            found = self._run(batch)
        # A detector that selects other boxes may go other ways from there on.
        pairs = [(got, want) for got, want in zip(found, wanted, strict=False) if got.shape == want.shape]
        return torch.stack([_relative_error(got, want) for got, want in pairs]).mean()

    def judge(self, batches: Sequence[Inputs]) -> float:
        """The mean error of some batches, over all ranks."""
        with torch.no_grad():
            return float(mean_over_ranks(torch.stack([self.error(batch) for batch in batches]).mean()))

    def _change(self) -> Callable[[QATLayer, Compute], Compute]:
        """Lets layers compute with the weights and biases as learned so far."""
        rounding = self.rounding
        weights = {} if rounding is None else dict(zip(rounding.layers, rounding.weights(), strict=True))

        def change(layer: QATLayer, original: Compute) -> Compute:
            def compute(x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
                arguments = layer.operation_args if arguments is None else arguments
                return layer.operation(x, weights[layer], self._bias(layer), *arguments)

            return compute

        return change

    def _bias(self, layer: QATLayer) -> Tensor | None:
        bias = layer.float_bias()
        return bias if bias is None or layer not in self.units else bias + self.shifts[layer] * self.units[layer]

    def write(self) -> int:
        """Put what was learned into the model; returns how many weights have another code."""
        for layer, unit in self.units.items():
            layer.shift_bias(self.shifts[layer].detach() * unit)
        return 0 if self.rounding is None else self.rounding.write()

    @torch.no_grad()
    def restore_scales(self) -> None:
        """Set the scales, which are learned in place, to what they were."""
        for scale, first in zip(self.scales, self.first_scales, strict=True):
            scale.copy_(first)


def _learns(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _zeros(layer: QATLayer) -> Tensor:
    bias = layer.float_bias()
    assert bias is not None  # it is what the shifted bias becomes
    return torch.zeros_like(bias, requires_grad=True)


def _relative_error(got: Tensor, want: Tensor) -> Tensor:
    power = (want - want.mean()).square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (got - want).square().mean() / power


def _learn(student: _Student, batches: Sequence[Inputs], order: torch.Generator) -> None:
    optimizer = torch.optim.Adam(student.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    waiting: list[int] = []
    with progress("Reconstructing", STEPS, "step") as bar:
        for _ in range(STEPS):
            waiting = waiting or torch.randperm(len(batches), generator=order).tolist()
            with torch.enable_grad():
                error = student.error(batches[waiting.pop()])
                gradients = torch.autograd.grad(error, learned, allow_unused=True, materialize_grads=True)
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = mean_over_ranks(gradient)
            optimizer.step()
            schedule.step()
            if student.rounding is not None:
                student.rounding.limit()
            bar.update()
    optimizer.zero_grad()
