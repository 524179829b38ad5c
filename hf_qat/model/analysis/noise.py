"""How far each value of a quantized model is from the float one, by hooks, in one pass of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.graph.capture.inputs import Inputs, device_of
from hf_qat.model.analysis.histogram import count
from hf_qat.model.analysis.sites import Site
from hf_qat.model.batches import run_batches
from hf_qat.model.bias_correction import uncorrected
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.collectives import mean_over_ranks
from hf_qat.quantization.quantizer import ACTIVATIONS


#: Share of the magnitudes of a value that is called its bulk; what a range covers beyond it, few values need.
BULK = 0.999

#: So many numbers of a tensor are sorted to find its bulk.
SORTED = 2**18

#: From here on a number says that there is none: detectors and masks put out infinity, or the largest float there is.
NO_VALUE = 2.0**100

#: Site → the values that it returned in one batch, in the order of its calls.
Values = dict[str, list[Tensor]]


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise ratio in dB, 10 · log10(signal / noise), of two sums of squares.

    Infinite where there is no noise; minus infinity where there is noise and no signal.
    """
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def comparable(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What was found and what is wanted, in pairs, where both are numbers.

    A detector that selects other boxes returns another shape; what says that there is no value is left out.
    """
    pairs = []
    for got, want in zip(found, wanted, strict=False):
        if got.shape == want.shape:
            numbers = (want.abs() < NO_VALUE) & ~(got.abs() >= NO_VALUE)
            pairs.append((got, want) if bool(numbers.all()) else (got[numbers], want[numbers]))
    return [(got, want) for got, want in pairs if got.numel()]


@dataclass
class Noise:
    """Sums over the batches, for one site.

    Attributes:
        signal, noise: squares of the float values, and of their distance to the quantized ones, which what was
            quantized before them has changed, too.
        compared: whether any could be compared.
        own_signal, own_noise: squares of what the quantizer was given, and of what its rounding changed.
        minimum, maximum: of the float values.
        bulk: largest magnitude of all but 0.1 % of the float values (the largest of the batches).
        counts: of what the quantizer was given, as `histogram.count` gives them; `None` without a quantizer.
        outside: how many of the values that the quantizer was given lie beyond its range; `count`: of so many.
        channel_minimum, channel_maximum: of the quantized values; `None` where they have no channels.
    """

    signal: float = 0.0
    noise: float = 0.0
    compared: bool = False
    own_signal: float = 0.0
    own_noise: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    bulk: float = 0.0
    counts: Tensor | None = None
    outside: int = 0
    count: int = 0
    channel_minimum: Tensor | None = None
    channel_maximum: Tensor | None = None

    @property
    def ratio(self) -> float:
        """`sqnr` against the float model; minus infinity where nothing could be compared with it."""
        return sqnr(self.signal, self.noise) if self.compared else -math.inf

    def compare(self, expected: Tensor, actual: Tensor) -> None:
        """Add a value of the float model and that of the quantized one, if they are `comparable`."""
        for got, want in comparable([actual], [expected]):
            self.compared = True
            self.signal += energy(want)
            self.noise += energy(got - want)
            low, high = want.aminmax()
            self.minimum, self.maximum = min(self.minimum, float(low)), max(self.maximum, float(high))
            self.bulk = max(self.bulk, _bulk(want))

    def add_rounding(self, given: Tensor, returned: Tensor, bounds: tuple[float, float]) -> None:
        """Add what a quantizer, whose codes reach from and to `bounds`, was given and returned."""
        self.own_signal += energy(given)
        self.own_noise += energy(returned - given)
        counts = count(given, bounds)
        self.counts = counts if self.counts is None else self.counts + counts
        self.outside += int(((given < bounds[0]) | (given > bounds[1])).sum())
        self.count += given.numel()

    def add_channels(self, value: Tensor, axis: int) -> None:
        """Add what is seen of each channel, along `axis`, of a quantized value."""
        others = [dim for dim in range(value.dim()) if dim != axis]
        low, high = value.amin(others), value.amax(others)
        self.channel_minimum = low if self.channel_minimum is None else self.channel_minimum.minimum(low)
        self.channel_maximum = high if self.channel_maximum is None else self.channel_maximum.maximum(high)


@dataclass
class Measured:
    """What one pass has found.

    Attributes:
        sites: by path.
        outputs: signal and noise of what the model returns, as `Noise`.
        expected: what the float model returns, by batches.
    """

    sites: dict[str, Noise]
    outputs: Noise = field(default_factory=Noise)
    expected: list[list[Tensor]] = field(default_factory=list)


def measure(model: nn.Module, in_float: nn.Module, sites: Sequence[Site], batches: Iterable[Inputs]) -> Measured:
    """Run both models on each batch, and compare them at every site.

    Args:
        model: prepared or converted, with ranges.
        in_float: prepared, and run with its quantizers off; may be `model`.
        sites: of both models.
        batches: as forward takes them.
    """
    found = Measured({site.path: Noise() for site in sites})
    for batch in batches:
        values, outputs = _float_values(in_float, sites, batch)
        found.expected.append(outputs)
        with _comparing(model, sites, values, found.sites):
            actual = run(model, batch)
        for expected, value in zip(outputs, actual, strict=False):
            found.outputs.compare(expected, value)
    return found


def run(model: nn.Module, batch: Inputs) -> list[Tensor]:
    """What the model returns for a batch: its tensors of real numbers, in order; in evaluation, without gradients."""
    kept: list[Any] = []
    with model.register_forward_hook(lambda module, args, output: kept.append(output)):
        for _ in run_batches(model, [batch]):
            pass
    return [
        x.float() for x in torch.utils._pytree.tree_leaves(kept) if isinstance(x, Tensor) and x.is_floating_point()
    ]


def outputs_sqnr(model: nn.Module, batches: Sequence[Inputs]) -> float:
    """How near the outputs of a prepared model are to its own in float, in dB, over the batches of all ranks."""

    def in_float(batch: Inputs) -> list[Tensor]:
        with fake_quant_disabled(model):
            return run(model, batch)

    return sqnr_over_ranks(((run(model, batch), in_float(batch)) for batch in batches), device_of(model))


def sqnr_over_ranks(batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]], device: torch.device) -> float:
    """`sqnr` of all outputs, what was found and what is wanted, that are `comparable`; the mean over all ranks.

    The signal is what is wanted, less its mean.
    """
    signal = noise = 0.0
    for found, wanted in batches:
        pairs = comparable(found, wanted)
        signal += sum(energy(want - want.mean()) for _, want in pairs)
        noise += sum(energy(got - want) for got, want in pairs)
    return float(mean_over_ranks(torch.tensor(sqnr(signal, noise), dtype=torch.float32, device=device)))


def _float_values(model: nn.Module, sites: Sequence[Site], batch: Inputs) -> tuple[Values, list[Tensor]]:
    """The values at the sites, and the outputs, of a prepared model with its quantizers off."""
    values: Values = {site.path: [] for site in sites}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: values[path].append(output.float())

    with (
        uncorrected(model),
        fake_quant_disabled(model),
        _hooked(model, {site.output: keep(site.path) for site in sites}),
    ):
        return values, run(model, batch)


@contextmanager
def _comparing(model: nn.Module, sites: Sequence[Site], values: Values, found: Mapping[str, Noise]) -> Iterator[None]:
    """Inside, each site of a model that runs is compared with the next of its `values`."""
    with _hooked(
        model, {site.output: _comparison(model, site, values[site.path], found[site.path]) for site in sites}
    ):
        yield


def _comparison(model: nn.Module, site: Site, values: Iterable[Tensor], noise: Noise) -> Callable[..., None]:
    expected = iter(values)
    layer: Any = None if site.layer is None else model.get_submodule(site.layer)

    def compare(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        value = output.float()
        noise.compare(next(expected, value.new_empty(0)), value)
        if value.numel() == 0:
            return
        if site.quantizer is not None:
            activation = kwargs.get("activation")
            given = args[0].float() if activation is None else ACTIVATIONS[activation](args[0].float())
            noise.add_rounding(given, value, bounds(module))
        if layer is not None and value.dim() > 1:
            noise.add_channels(value, layer.channel_dim(value))

    return compare


def bounds(quantizer: Any) -> tuple[float, float]:
    """The least and the largest number that the codes of a quantizer, prepared or converted, stand for."""
    spec, scale = quantizer.spec, quantizer.scale.detach().float()
    zero = torch.zeros_like(scale) if quantizer.zero_point is None else quantizer.zero_point.detach().float().round()
    return float(((spec.qmin - zero) * scale).min()), float(((spec.qmax - zero) * scale).max())


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for path, hook in hooks.items():
            stack.enter_context(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        yield


def energy(x: Tensor) -> float:
    """The sum of the squares of `x`, in double precision."""
    return float(x.double().square().sum())


def _bulk(x: Tensor) -> float:
    magnitudes = x.abs().flatten()
    step = max(1, magnitudes.numel() // SORTED)
    magnitudes = magnitudes[::step]
    return float(magnitudes.kthvalue(max(1, math.ceil(BULK * magnitudes.numel()))).values)
