"""Choose the range of each layer's input among those of several observers, by the error of the layer's output.

No observer is the best for all tensors (Nagel et al. 2021, "A White Paper on Neural Network Quantization", §3.1): what
counts is not how well the values come out, but what the layer makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.progress import progress
from hf_qat.model.batches import run_batches
from hf_qat.model.computing import computing_by
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.collectives import mean_over_ranks, min_over_ranks
from hf_qat.quantization.fake_quantize import fake_quantize
from hf_qat.quantization.layers import QATLayer, qat_layers
from hf_qat.quantization.observers import Observer, make_observer
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec


#: Names of the observers to choose from.
CHOICES = ("mse", "percentile", "minmax")


class SeveralObservers:
    """A `RangeCollector` that ends in the range of the recipe's own observer, and remembers those of `CHOICES`."""

    def __init__(self, spec: QuantizerSpec) -> None:
        self.own = spec.observer
        names = dict.fromkeys((spec.observer, *CHOICES))
        self.observers = {name: make_observer(replace(spec, observer=name)) for name in names}

    def observe(self, x: Tensor) -> None:
        """Take `x` into account."""
        for observer in self.observers.values():
            observer.observe(x)

    def synchronize(self) -> None:
        """Merge the state over all ranks."""
        for observer in self.observers.values():
            observer.synchronize()

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the recipe's own observer."""
        return self.observers[self.own].qparams()

    def choices(self) -> list[tuple[Tensor, Tensor]]:
        """Scale and zero point by each observer, the recipe's own first."""
        return [observer.qparams() for observer in self.observers.values()]


def observe_in_several_ways(quantizers: Iterable[FakeQuantize]) -> dict[FakeQuantize, SeveralObservers]:
    """Let those of `quantizers` that have just started observing do so by several observers.

    Not those that look at something else than the range of a batch: a weight, or a moving average.
    """
    found = {}
    for quantizer in quantizers:
        if isinstance(quantizer.observer, Observer) and quantizer.spec.observer in CHOICES:
            quantizer.observer = found[quantizer] = SeveralObservers(quantizer.spec)
    return found


@torch.no_grad()
def choose_ranges(
    model: nn.Module, observed: Mapping[FakeQuantize, SeveralObservers], batches: Sequence[Inputs]
) -> None:
    """Give each quantizer whose codes a layer reads the range with which the layers' outputs change the least.

    The error of an output is taken relative to its power, so that all layers that read the same codes count alike. A
    quantizer that no layer reads keeps its range.

    Collective: all ranks choose by the mean of their errors.
    """
    layers = {path: layer for path, layer in qat_layers(model).items() if layer.quantizer_of_input in observed}
    choices = {quantizer: observers.choices() for quantizer, observers in observed.items()}
    candidates = {quantizer: _candidates(quantizer, found) for quantizer, found in choices.items()}
    errors = {
        quantizer: torch.zeros(len(found), dtype=torch.float64, device="cpu")
        for quantizer, found in candidates.items()
    }

    def compute_and_compare(layer: QATLayer, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        quantizer = layer.quantizer_of_input
        assert quantizer is not None
        spec = quantizer.spec

        def compute(x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
            output = original(x, arguments)
            power = output.double().square().mean().clamp_min(torch.finfo(torch.float64).tiny)
            for position, (scale, zero_point) in enumerate(candidates[quantizer]):
                rounded = fake_quantize(x, scale, zero_point, spec.qmin, spec.qmax)
                error = (original(rounded, arguments) - output).double().square().mean()
                errors[quantizer][position] += (error / power).cpu()
            return output

        return compute

    batches = batches[: min_over_ranks(len(batches))]
    with fake_quant_disabled(model), computing_by(layers.values(), compute_and_compare):
        with progress("Choosing ranges", len(batches), "batch") as bar:
            for _ in run_batches(model, batches):
                bar.update()
    for quantizer, found in choices.items():
        best = int(mean_over_ranks(errors[quantizer].to(quantizer.log2_scale)).argmin())
        quantizer.set_qparams(*found[best])


def _candidates(
    quantizer: FakeQuantize, choices: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor | None]]:
    """Scale and zero point by each observer, as the quantizer has them: limited, a power of two, and so on."""
    found = []
    for scale, zero_point in choices:
        quantizer.set_qparams(scale, zero_point)
        zero = quantizer.zero_point
        found.append((quantizer.scale.detach().clone(), None if zero is None else zero.detach().clone()))
    return found
