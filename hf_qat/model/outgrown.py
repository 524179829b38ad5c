"""Ranges that training has outgrown: those of a new head, and most of those of a net that is trained from scratch.

A learned scale takes steps of a few percent, and values beyond the range pass no gradient, so a range that was found
before training can hold a net back that has still to grow. At a few steps each range is therefore observed again, as
calibration does, on the batch of that step; one that is far too small is set to what was seen. As calibration does:
without labels and in evaluation, because what only training computes (denoising queries of a detector, with boxes far
off) reaches beyond ranges that are right for the device. Of a model that is trained already, ranges must also cut off
much, and those of less than 8 bits are not set at all: training clips more than calibration would, on purpose.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from hf_qat.errors import CalibrationError
from hf_qat.graph.capture.inputs import LABEL_NAMES, device_of
from hf_qat.graph.capture.modes import buffers_kept, evaluating
from hf_qat.graph.random_state import random_state_kept
from hf_qat.graph.user_hooks import without_user_hooks
from hf_qat.model.call_in_training import Call
from hf_qat.model.eager import in_eager_mode
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.model.untrained import batch_statistics
from hf_qat.quantization.collectives import min_over_ranks, range_over_ranks
from hf_qat.quantization.layers import QATLayer, qat_layers
from hf_qat.quantization.observers import Observer, make_observer
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.scales import scale_from_range
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.weight_quantizer import activation_quantizers
from hf_qat.quantization.weight_scale import rows_of, weight_scale


#: A range is outgrown if what is seen reaches beyond it by more than this share of its width,
OUTGROWN = 0.5

#: and, of a model that was trained already, cuts off so much of the values' power: learned scales become smaller, too.
#: A MobileViT at TDA4VM lost a point of accuracy in one epoch where they were made twice as large again each time,
CUT_OFF = 0.1

#: or if more than this share of the values lies beyond, where no gradient passes, so that they may not reach far;
SATURATED = 0.1

#: and what calibration would choose now reaches further by so much of the width. Few bits clip many values on purpose.
REACHES_FURTHER = 0.1

#: The range of a weight is outgrown if rounding by it also loses so many times what it would by the range of today:
#: of few values, the range of the least error jumps, while the errors are about the same.
LOSES_MORE = 2.0

#: Ranges of fewer bits clip on purpose: in a model that is trained already, learning alone moves them. Measured: a
#: MobileNetV2 at w4a4, one epoch, ended at 77.0 where they were set anew, and at 82.9 where not.
CLIP_BELOW_BITS = 8

#: So many at least: of twenty logits, two are beyond a range by chance.
FEWEST_SATURATED = 16

#: Least divisor, of a range or of a power that may be 0.
TINY = 1e-30

#: How much wider than what is seen a range becomes that was outgrown: most go on growing.
HEADROOM = 1.5


class _Watch(Observer):
    """Observes as calibration does, and counts the values that lie beyond the present range of a quantizer.

    Args:
        quantizer: that is observed.
        spec: what the range is chosen for.

    Attributes:
        saturated: share of the values of all calls that lie beyond; 0 if there are few.
        cut_off: share of their power that lies there.
    """

    def __init__(self, quantizer: FakeQuantize, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.low, self.high = _bounds(quantizer, quantizer.scale, quantizer.zero_point)
        self.saturated = self.cut_off = 0.0
        # How many lie beyond, of how many; power beyond, of all.
        self._sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        self._observer = make_observer(spec)

    def _update(self, values: Tensor, low: float, high: float) -> None:
        exact = values.double()  # a range that diverges ends beyond float32
        beyond = exact - exact.clamp(self.low, self.high)
        powers = [beyond.square().sum().item(), exact.square().sum().item()]
        self._sums += self._sums.new_tensor([int(beyond.count_nonzero()), values.numel(), *powers])
        outside, count, cut_off, power = self._sums.tolist()
        self.saturated = outside / count if outside >= FEWEST_SATURATED else 0.0
        self.cut_off = cut_off / max(power, TINY)
        self._observer.observe(values)

    def _range(self) -> tuple[float, float]:
        return self._observer._range()

    def _merge_ranks(self) -> None:
        self._observer.synchronize()
        shares = [self.saturated, self.cut_off]
        self.saturated, self.cut_off = range_over_ranks(shares, shares)[1]


@torch.no_grad()
def renew_outgrown_ranges(model: nn.Module, call: Call, trained: bool = False) -> list[str]:
    """Set those ranges of activations and weights that are far too small for what the model computes in float.

    Collective: all ranks see the ranges of the data of all.

    Args:
        model: prepared and calibrated, in training. It is run once more, which leaves no trace; in evaluation, with
            the statistics of the batch where batch norm has them in training.
        call: the arguments of a forward call; labels go, where forward can do without them.
        trained: the model was so before this training, all of it.

    Returns:
        Paths of the quantizers whose ranges were set. Frozen and fixed ones stay as they are, and so do those that
        follow the data by themselves, and those of weights that the model computes.
    """
    fewest_bits, cut_off = (CLIP_BELOW_BITS, CUT_OFF) if trained else (0, 0.0)
    quantizers = {path: q for path, q in activation_quantizers(model).items() if _can_outgrow(q, fewest_bits)}
    watches = {path: _Watch(quantizer, _of_any_scale(quantizer.spec)) for path, quantizer in quantizers.items()}
    renewed = []
    if _watch(model, call, quantizers, watches):
        renewed = [path for path, watch in watches.items() if _renew(quantizers[path], watch, cut_off)]
    return renewed + [
        f"{path}.weight_quantizer" for path, layer in qat_layers(model).items() if _renew_weight(layer, fewest_bits)
    ]


@torch.no_grad()
def set_ranges_anew(model: nn.Module, call: Call) -> None:
    """Set all ranges, of activations and weights, as calibration does, by what one call shows; frozen ones stay.

    Collective. Where the call finds values without a range, all ranges stay.

    Args:
        model: prepared and calibrated, in training; as in `renew_outgrown_ranges`.
        call: the arguments of a forward call.
    """
    quantizers = {path: q for path, q in activation_quantizers(model).items() if q.wants_range()}
    watched = {path: quantizer for path, quantizer in quantizers.items() if quantizer.spec.fixed_scale is None}
    watches = {path: _Watch(quantizer, quantizer.spec) for path, quantizer in watched.items()}
    if not _watch(model, call, quantizers, watches):
        return
    for path, watch in watches.items():
        quantizers[path].observer = watch
        with suppress(CalibrationError):  # this call did not come here
            quantizers[path].finish_observing(path)
    for layer in qat_layers(model).values():
        if layer.weight_quantizer.wants_range() and not isinstance(layer.weight, DTensor):  # FSDP2 has split it
            layer.initialize_scale()


def _can_outgrow(quantizer: FakeQuantize, fewest_bits: int) -> bool:
    learns = quantizer.enabled and quantizer.learned and not quantizer.frozen and quantizer.log2_scale.requires_grad
    return learns and quantizer.spec.bits >= fewest_bits


def _watch(model: nn.Module, call: Call, quantizers: dict[str, FakeQuantize], watches: dict[str, _Watch]) -> bool:
    """Run a call in float, and watch what passes; false in all processes if one finds values without a range."""
    args, kwargs = call
    inputs = {name: value for name, value in kwargs.items() if name not in _optional_labels(model)}
    live = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for path, watch in watches.items():
        quantizers[path].observer = watch
    try:
        with _unseen(model), evaluating(model), batch_statistics(live), fake_quant_disabled(model):
            with torch.no_grad(), in_eager_mode():
                model(*args, **inputs)
        found = True
    except CalibrationError:  # a training that diverges goes on, as it would without us
        found = False
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
    if not min_over_ranks(int(found)):
        return False
    for watch in watches.values():
        watch.synchronize()
    return True


def _optional_labels(model: nn.Module) -> set[str]:
    """Names of labels that forward does not insist on."""
    parameters = inspect.signature(model.forward).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    return set(LABEL_NAMES - required)


@contextmanager
def _unseen(model: nn.Module) -> Iterator[None]:
    """Inside, the model may run once more: the user's hooks are not called, random numbers and buffers come back."""
    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, FSDPModule):  # whose hooks gather the weights
                stack.enter_context(without_user_hooks(module))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(random_state_kept(device_of(model)))
        yield


def _renew(quantizer: FakeQuantize, watch: _Watch, cut_off: float) -> bool:
    try:
        low, high = _bounds(quantizer, *watch.qparams())
    except CalibrationError:  # this call did not come here
        return False
    width = max(watch.high - watch.low, TINY)  # a scale that diverges can become 0
    further = max(watch.low - low, high - watch.high) / width
    outgrown = (further > OUTGROWN and watch.cut_off >= cut_off) or (
        further > REACHES_FURTHER and watch.saturated > SATURATED
    )
    is_limited = quantizer.scale_limit is not None and float(quantizer.scale) >= quantizer.scale_limit
    if is_limited or not outgrown:
        return False
    headroom = 1.0 if quantizer.spec.power_of_two else HEADROOM  # which is rounded up
    low = headroom * low if low < watch.low else watch.low
    high = headroom * high if high > watch.high else watch.high
    bounds = torch.tensor([low, high], dtype=torch.float32, device="cpu")
    quantizer.set_qparams(*scale_from_range(bounds[0], bounds[1], quantizer.spec))
    return True


def _of_any_scale(spec: QuantizerSpec) -> QuantizerSpec:
    """The same without powers of two, between which a hair's breadth of data makes a range twice as wide."""
    return replace(spec, power_of_two=False)


def _bounds(quantizer: FakeQuantize, scale: Tensor, zero_point: Tensor | None) -> tuple[float, float]:
    zero = 0.0 if zero_point is None else float(zero_point)
    return (quantizer.spec.qmin - zero) * float(scale), (quantizer.spec.qmax - zero) * float(scale)


def _renew_weight(layer: QATLayer, fewest_bits: int) -> bool:
    quantizer = layer.weight_quantizer
    if not _can_outgrow(quantizer, fewest_bits) or isinstance(layer.weight, DTensor):  # FSDP2 has split it
        return False
    weight = layer.float_weight().detach()
    if not bool(weight.isfinite().all()):  # a training that diverges goes on, as it would without us
        return False
    seen, scale = weight_scale(weight, quantizer.spec), quantizer.scale.detach()
    loses_more = _loss(weight, scale, quantizer.spec) > LOSES_MORE * _loss(weight, seen, quantizer.spec)
    outgrown = (seen > (1 + OUTGROWN) * scale) & loses_more
    if not bool(outgrown.any()):
        return False
    quantizer.set_qparams(torch.where(outgrown, seen, scale))
    return True


def _loss(weight: Tensor, scale: Tensor, spec: QuantizerSpec) -> Tensor:
    """The squared error of a weight that is rounded by `scale`, for each scale: () or (C,), as `scale`."""
    rows = rows_of(weight, spec.axis)
    steps = scale.reshape(-1, 1)
    rounded = (rows / steps).round().clamp(spec.qmin, spec.qmax) * steps
    return (rows - rounded).square().sum(1).view(scale.shape)
