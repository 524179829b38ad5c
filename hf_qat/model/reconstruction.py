"""Reconstruction: choose codes, scales and biases so that every quantized tensor comes out as in the float model.

What is learned, from images without labels: which of its two nearest codes each weight gets (AdaRound, Nagel et al.
2020), the scales and offsets of activations (LSQ, Esser et al. 2020), and biases. All layers learn together, as those
of one block do in BRECQ (Li et al. 2021): each gets its input from the quantized layers before it, and the error is
measured wherever a value is quantized, against the float model on the same images. What is maximised is the mean
signal-to-noise ratio of all these tensors in decibels: one decibel counts the same for logits that pooling has made
precise as for feature maps full of rounding noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_qat.graph.capture.inputs import Inputs, device_of
from hf_qat.graph.capture.modes import evaluating
from hf_qat.graph.progress import progress
from hf_qat.model.analysis.noise import run, sqnr_over_ranks
from hf_qat.model.batches import call_of
from hf_qat.model.computing import Compute, computing_by
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.collectives import mean_over_ranks
from hf_qat.quantization.layers import QATLayer, qat_layers
from hf_qat.quantization.learned_rounding import LearnedRounding
from hf_qat.quantization.standalone_norm import QATStandaloneBatchNorm
from hf_qat.quantization.weight_quantizer import activation_quantizers


logger = logging.get_logger(__name__)

#: Steps of the optimizer, one batch each.
STEPS = 600

#: Rates of Adam at the first step, from where they fall to 0 by a cosine: of positions between two codes, of scales
#: (log2) and offsets, and of biases, in units of the standard deviation of what the layer puts out.
ROUNDING_RATE, SCALE_RATE, BIAS_RATE = 1e-2, 5e-3, 3e-3

#: The share of the batches that are not learned from, at most so many: what is learned of few images need not hold for
#: others, and these tell how far it does.
JUDGED_SHARE, JUDGED_BATCHES = 0.25, 8

#: So often they are asked; what was best is kept.
JUDGEMENTS = 6

#: Least relative error that counts, 60 dB below the signal: finer than anything of 8 bits.
LEAST_ERROR = 1e-6

#: Least variance that an error is divided by: of a tensor that is constant in float, such as zeros. The gradient of an
#: error of 0 is at most 1 / (LEAST_ERROR * LEAST_POWER) times 0, and must not be infinity times 0.
LEAST_POWER = 1e-30


def reconstruct(
    model: nn.Module, batches: Sequence[Inputs], shifts: Mapping[QATLayer, Tensor], seed: int = 0
) -> dict[QATLayer, Tensor]:
    """Learn, in place but for the biases, what makes the quantized model compute what the float model does.

    Weights, scales and biases that are frozen or do not require gradients stay as they are; and so do all, if the
    model's outputs are never nearer to those in float, on batches that are not learned from.

    Collective: all ranks learn alike, each from its own batches.

    Args:
        model: prepared and calibrated; batch norms go by their running statistics meanwhile.
        batches: of images, at least one.
        shifts: of biases, (C,) each, to begin with; only theirs are learned.
        seed: of the order of the batches.

    Returns:
        `shifts` as learned. The biases themselves are as they were: the float model is to go by them to the end.
    """
    student = _Student(model, shifts)
    if not student.parameters():
        return dict(shifts)
    learned_from, judged_by = _split(batches)
    with evaluating(model), student.collecting():
        student.measure_outputs(batches[0])
        judge = student.judge(judged_by)
        before = judge()
        after = _learn(student, learned_from, judge, before, torch.Generator().manual_seed(seed))
    found = f"signal to quantization noise of the outputs {before:.2f} dB before, {after:.2f} dB afterwards"
    logger.info(f"Reconstruction: {student.write()} weights have other codes; {found}.")
    return {layer: student.shift(layer).detach() for layer in shifts}


def _split(batches: Sequence[Inputs]) -> tuple[Sequence[Inputs], Sequence[Inputs]]:
    """Those to learn from, and those to judge by: the same, where there is one alone."""
    judged = min(JUDGED_BATCHES, math.ceil(JUDGED_SHARE * len(batches)))
    return (batches[:-judged], batches[-judged:]) if judged < len(batches) else (batches, batches)


class _Student:
    """The quantized model with what it learns, beside the float model: that is the model without quantizers."""

    def __init__(self, model: nn.Module, shifts: Mapping[QATLayer, Tensor]) -> None:
        self.model, self.first_shifts = model, shifts
        self.activations = [quantizer for quantizer in activation_quantizers(model).values() if quantizer.enabled]
        self.layers = [layer for layer in qat_layers(model).values() if layer.weight_quantizer.enabled]
        # A batch norm's weight is a factor, one number a channel: its bias is made of it, and would move along.
        convolving = [layer for layer in self.layers if not isinstance(layer, QATStandaloneBatchNorm)]
        owners = Counter(id(layer.weight) for layer in convolving)  # one weight has one set of codes
        rounded = [layer for layer in convolving if layer.weight.requires_grad and owners[id(layer.weight)] == 1]
        self.rounding = LearnedRounding(rounded) if rounded else None
        self.shifts = {
            layer: torch.zeros_like(shifts[layer], requires_grad=True)
            for layer in self.layers
            if layer in shifts and _learns(layer.shifted_bias())
        }
        # A power of two stays or doubles: small steps lead nowhere, and back and forth between two exponents.
        on = [q for q in self.activations if q.learned and not q.frozen and not q.spec.power_of_two]
        self.scales = [parameter for quantizer in on for parameter in quantizer.parameters() if _learns(parameter)]
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
        with ExitStack() as stack:
            for quantizer in self.activations:
                stack.enter_context(quantizer.register_forward_hook(self._collect))
            yield

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
                if output.numel():
                    self.units[layer] = mean_over_ranks(output.std(correction=0))
                return output

            return compute

        with fake_quant_disabled(self.model), computing_by(self.shifts, change):
            self._run(batch)

    def error(self, batch: Inputs) -> Tensor:
        """Mean over all quantized tensors of the noise-to-signal ratio in decibels: (), differentiable."""
        with torch.no_grad(), fake_quant_disabled(self.model):
            wanted = self._run(batch)
        with computing_by(self.layers, self._change()):
            found = self._run(batch)
        # A detector that selects other boxes may go other ways from there on.
        every = zip(found, wanted, strict=False)
        pairs = [(got, want) for got, want in every if got.shape == want.shape and got.numel()]
        return torch.stack([_noise_to_signal(got, want) for got, want in pairs]).mean()

    def judge(self, batches: Sequence[Inputs]) -> Callable[[], float]:
        """Tells, each time it is called, how near the outputs for some batches are to those in float by now.

        In decibels of signal to noise, over all ranks. What the float model returns is computed once.
        """
        with fake_quant_disabled(self.model):
            expected = [run(self.model, batch) for batch in batches]
        self.outputs.clear()

        def found(batch: Inputs) -> list[Tensor]:
            with computing_by(self.layers, self._change()):
                outputs = run(self.model, batch)
            self.outputs.clear()
            return outputs

        @torch.no_grad()
        def ratio() -> float:
            return sqnr_over_ranks(zip(map(found, batches), expected, strict=True), device_of(self.model))

        return ratio

    def _change(self) -> Callable[[QATLayer, Compute], Compute]:
        """Lets layers compute with the weights and biases as learned so far."""
        rounding = self.rounding
        weights = {} if rounding is None else dict(zip(rounding.layers, rounding.weights(), strict=True))

        def change(layer: QATLayer, original: Compute) -> Compute:
            def compute(x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
                arguments = layer.operation_args if arguments is None else arguments
                weight = weights[layer] if layer in weights else layer.folded(layer.device_scale())[0]
                return layer.operation(x, weight, self._bias(layer), *arguments)

            return compute

        return change

    def _bias(self, layer: QATLayer) -> Tensor | None:
        bias = layer.float_bias()
        return bias if bias is None or layer not in self.first_shifts else bias + self.shift(layer)

    def shift(self, layer: QATLayer) -> Tensor:
        """What is added to the layer's bias, as learned so far: (C,)."""
        first = self.first_shifts[layer]
        return first + self.shifts[layer] * self.units[layer] if layer in self.units else first

    def write(self) -> int:
        """Put what was learned of weights into the model; returns how many have another code."""
        return 0 if self.rounding is None else self.rounding.write()


def _learns(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _noise_to_signal(got: Tensor, want: Tensor) -> Tensor:
    """Squared error relative to the variance of `want`, in decibels."""
    power = (want - want.mean()).square().mean().clamp_min(LEAST_POWER)
    return 10 * torch.log10((got - want).square().mean() / power + LEAST_ERROR)


def _learn(
    student: _Student,
    batches: Sequence[Inputs],
    judge: Callable[[], float],
    best: float,
    order: torch.Generator,
) -> float:
    """Learn from `batches`, and end with what `judge` finds best; returns its figure, which is `best` at first."""
    optimizer = torch.optim.Adam(student.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in learned]
    waiting: list[int] = []
    with progress("Reconstructing", STEPS, "step") as bar:
        for step in range(1, STEPS + 1):
            waiting = waiting or torch.randperm(len(batches), generator=order, device="cpu").tolist()
            with torch.enable_grad():
                error = student.error(batches[waiting.pop()])
                gradients = torch.autograd.grad(error, learned, allow_unused=True, materialize_grads=True)
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = mean_over_ranks(gradient)
            optimizer.step()
            schedule.step()
            if student.rounding is not None:
                student.rounding.limit()
            if step % max(1, STEPS // JUDGEMENTS) == 0 and (ratio := judge()) > best:
                best, kept = ratio, [parameter.detach().clone() for parameter in learned]
            bar.update()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(learned, kept, strict=True):
            parameter.copy_(value)
    return best
