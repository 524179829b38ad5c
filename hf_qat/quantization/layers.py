"""Convolutions and linear layers in training: fake-quantized weight, batch norm folded into it (in two phases).

Krishnamoorthi 2018 §3.2.2, Jacob et al. 2018 §3.2. With f = gamma / sigma (running) the quantized weight is q(w * f):

- batch norm live: convolve with q(w * f) / f and let the batch norm itself normalise by batch statistics;
- batch norm frozen: one convolution with q(w * f) and the bias beta + (b - mean) * f, and no batch norm.

Dividing the small weight by f, not the large output, keeps batch norm's epsilon and its running statistics exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.quantization.bias import bias_scale, fit_weight_scale, quantize_bias
from hf_qat.quantization.bound_functions import BOUND
from hf_qat.quantization.class_swap import forget_own_forward, original_class, require_free_names, swap_class
from hf_qat.quantization.fake_quantize import along, quantize
from hf_qat.quantization.folding import fold_fake_quantize
from hf_qat.quantization.kernels import fuses
from hf_qat.quantization.kernels.folding import SMALLEST_FACTOR, FoldCall, Folding, Norm
from hf_qat.quantization.layer_folding import fold_layer, fold_together
from hf_qat.quantization.live_norm import is_live, normalise_live
from hf_qat.quantization.operation_pickling import register
from hf_qat.quantization.quantizer import FakeQuantize, fake_quantizers
from hf_qat.quantization.running_graph import is_running_graph
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.weight_scale import weight_scale


#: Attribute of a layer: weight and bias that its next call uses, which `folded_ahead` has computed.
AHEAD = "_ahead"

#: Attribute of a layer whose bias calibration has corrected: what it was before, and what it became.
CORRECTED = "_corrected_bias"

register()  # a layer holds the operation that it computes


@torch.library.custom_op("hf_qat::snapshot", mutates_args=())
def snapshot(x: Tensor) -> Tensor:
    """A copy that a compiler must keep for backward: it cannot compute it again from what it does not see into.

    What is computed of running statistics, it would compute again in backward, from the statistics that the batch norm
    has moved since: with other gradients, or with an error (torch 2.11 to 2.13).
    """
    return x.clone()


@snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class QATLayer(nn.Module):
    """Mixed into the class of a convolution or linear layer by `install_layer`; parameters keep their names.

    Attributes:
        weight_quantizer: scale of the folded weight.
        operation: the ATen operation; `operation_args`: its arguments after the bias (stride, padding, …).
        channel_axis: the axis of the weight that output channels run along.
        batch_norm_frozen: use running statistics although training.
    """

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: FakeQuantize
    operation: Callable[..., Tensor]
    operation_args: tuple[Any, ...]
    channel_axis: int
    batch_norm_frozen: bool
    # In tuples, so that neither is registered a second time, under a second name.
    _batch_norm: tuple[nn.Module, ...]
    _input_quantizer: tuple[FakeQuantize, ...]

    @property
    def batch_norm(self) -> nn.Module | None:
        """The batch norm that is folded into this layer; it stays registered where the model has it."""
        return self._batch_norm[0] if self._batch_norm else None

    @property
    def quantizer_of_input(self) -> FakeQuantize | None:
        """The quantizer whose codes come in; `None` where the input is not quantized."""
        return self._input_quantizer[0] if self._input_quantizer else None

    def set_input_quantizer(self, quantizer: FakeQuantize) -> None:
        """Say whose codes come in."""
        self._input_quantizer = (quantizer,)

    def forward(self, x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
        """See `compute`; called by Python code, as of a part alone, without batch norm: that code calls it next."""
        if self.batch_norm is None or is_running_graph():
            return self.compute(x, arguments)
        operation: Callable[..., Tensor] = BOUND.get(self.operation, self.operation)
        return operation(x, self._unfolded_weight(), self.bias, *(arguments or self.operation_args))

    def compute(self, x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
        """(N, C_in, …) → (N, C_out, …), batch norm included.

        Args:
            x: the input.
            arguments: in place of `operation_args`, where a layer is called in several ways.
        """
        batch_norm, arguments = self.batch_norm, self.operation_args if arguments is None else arguments
        operation: Callable[..., Tensor] = BOUND.get(self.operation, self.operation)
        if batch_norm is not None and self.has_live_norm():
            out = operation(x, self._unfolded_weight(), self.bias, *arguments)
            return normalise_live(batch_norm, out)
        if self.training and self._folds_at_once():
            return operation(x, *self._folded_at_once(live=False), *arguments)
        scale = self._scale() if self.training else self.device_scale()
        weight, bias = self.folded(scale)
        if not self.training and bias is not None:
            bias = self._rounded_bias(bias, scale)
        return operation(x, weight, bias, *arguments)

    def has_live_norm(self) -> bool:
        """Whether the batch norm that is folded into it uses batch statistics."""
        return is_live(self.batch_norm) and not self.batch_norm_frozen

    def leaves_scale_alone(self) -> bool:
        """Whether it computes without the scale of its weight for now, which then gets no gradient."""
        return False

    def device_scale(self) -> Tensor:
        """Scale of the weight on the device: the quantizer's, or larger where a channel's bias would not fit int32."""
        scale, source, bias = self._scale(), self.quantizer_of_input, self.float_bias()
        if source is None or bias is None:
            return scale
        return fit_weight_scale(scale, bias.detach(), source.scale.detach(), self.weight_quantizer.spec.power_of_two)

    def _rounded_bias(self, bias: Tensor, weight_scale: Tensor) -> Tensor:
        """The bias as the device has it, in int32; in evaluation only: it is too fine to matter to training.

        Its gradient is handed on as it comes: parts that are kept in evaluation are trained, too.
        """
        source = self.quantizer_of_input
        if source is None or not (source.rounds and self.weight_quantizer.rounds):
            return bias
        scale = bias_scale(source.scale.detach(), weight_scale.detach())
        rounded = (quantize_bias(bias, scale).to(torch.float32) * scale).to(bias.dtype)
        return rounded + (bias - bias.detach())

    def fold_factor(self) -> Tensor | None:
        """gamma / sqrt(running variance + eps), (C,), or `None` without batch norm."""
        bn: Any = self.batch_norm
        if bn is None:
            return None
        inverse = torch.rsqrt(bn.running_var + bn.eps)
        return inverse if bn.weight is None else bn.weight * inverse

    def _unfolded_weight(self) -> Tensor:
        """q(w * f) / f, for a live batch norm; the factor itself gets no gradient: the batch norm cancels it."""
        quantizer = self.weight_quantizer
        if not quantizer.rounds:
            return self.weight
        if self._folds_at_once():
            return self._folded_at_once(live=True)[0]
        with torch.no_grad():
            factor = self.fold_factor()
        assert factor is not None
        factor = snapshot(torch.where(factor.abs() < SMALLEST_FACTOR, SMALLEST_FACTOR, factor))
        scale = self._scale()
        return fold_fake_quantize(
            self.weight, factor / scale, scale / factor, quantizer.spec.qmin, quantizer.spec.qmax, self.channel_axis
        )

    def folds_ahead(self) -> bool:
        """Whether its next call in training could find its weight there already, folded by a kernel."""
        if not (self.training and self._folds_at_once() and fuses(self.weight)):
            return False
        return not (self.weight.is_cuda and torch.cuda.is_current_stream_capturing())

    def _folds_at_once(self) -> bool:
        """Whether scale, fold and rounding are one operation; a compiler is given the formulas to fuse."""
        return self.weight_quantizer.rounds and not torch.compiler.is_compiling()

    def _folded_at_once(self, live: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the operation in training; by a kernel, in the type that autocast wants."""
        call = self._fold_call(live)
        ahead = self.__dict__.pop(AHEAD, None)  # a second call of the layer comes after its batch norm has moved
        if ahead is None or ahead[0].dtype != call.folding.dtype:
            ahead = fold_layer(*call)
        weight, bias = ahead
        return weight, self.bias if call.norm is None else bias

    def _fold_call(self, live: bool) -> FoldCall:
        bn: Any = self.batch_norm
        weight, quantizer = self.weight, self.weight_quantizer
        spec, log2_scale, device = quantizer.spec, quantizer.log2_scale, weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        norm, eps = None, 0.0
        if bn is not None:
            norm, eps = Norm(bn.running_mean, bn.running_var, bn.weight, bn.bias, self.bias), bn.eps
        return FoldCall(
            weight,
            log2_scale.detach() if quantizer.frozen else log2_scale,
            norm,
            Folding(spec.qmin, spec.qmax, self.channel_axis, spec.power_of_two, live, eps, dtype),
        )

    def folded(self, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight as the device sees it, batch norm folded in and quantized at `scale` if enabled, and its bias."""
        quantizer, factor = self.weight_quantizer, self.fold_factor()
        qmin, qmax, axis = quantizer.spec.qmin, quantizer.spec.qmax, self.channel_axis
        if factor is None:
            if not quantizer.rounds:
                return self.weight, self.bias
            return fold_fake_quantize(self.weight, None, scale, qmin, qmax, axis), self.bias
        if quantizer.rounds:
            weight = fold_fake_quantize(self.weight, factor / scale, scale, qmin, qmax, axis)
        else:
            weight = self.weight * along(factor, self.weight, self.channel_axis)
        return weight, self._folded_bias(factor)

    def float_bias(self) -> Tensor | None:
        """(C,), batch norm folded in, not rounded."""
        factor = self.fold_factor()
        return self.bias if factor is None else self._folded_bias(factor)

    def _folded_bias(self, factor: Tensor) -> Tensor:
        bn: Any = self.batch_norm
        mean = bn.running_mean if self.bias is None else bn.running_mean - self.bias
        return -mean * factor if bn.bias is None else torch.addcmul(bn.bias, mean, factor, value=-1.0)

    def _scale(self) -> Tensor:
        scale = self.weight_quantizer.scale
        return scale.detach() if self.weight_quantizer.frozen else scale

    @torch.no_grad()
    def float_weight(self) -> Tensor:
        """The folded weight before quantization."""
        factor = self.fold_factor()
        return self.weight if factor is None else self.weight * along(factor, self.weight, self.channel_axis)

    @torch.no_grad()
    def codes(self, scale: Tensor) -> Tensor:
        """int32 codes of the folded weight at `scale`, by the very expression that training computes."""
        spec, factor = self.weight_quantizer.spec, self.fold_factor()
        if factor is None:
            return quantize(self.weight, scale, None, spec.qmin, spec.qmax, spec.axis)
        folded = self.weight * along((factor / scale).expand(factor.shape), self.weight, self.channel_axis)
        return folded.round_().clamp_(spec.qmin, spec.qmax).to(torch.int32)

    @torch.no_grad()
    def initialize_scale(self, spec: QuantizerSpec | None = None) -> None:
        """Set the scale of the weight by `spec` (default: the quantizer's own way, for instance least error)."""
        self.weight_quantizer.set_qparams(weight_scale(self.float_weight(), spec or self.weight_quantizer.spec))

    def channel_dim(self, output: Tensor) -> int:
        """Axis of the channels in the output: 1 of a convolution's (0 unbatched), the last of a linear layer's."""
        return output.dim() - 1 if self.weight.dim() == 2 else output.dim() - self.weight.dim() + 1

    def restore_class(self) -> None:
        """Take back the class that the module had before `install_layer`."""
        self.__class__ = original_class(type(self))

    def shifted_bias(self) -> Tensor | None:
        """What a bias correction changes: the bias of the batch norm if there is one, else the layer's own."""
        bn: Any = self.batch_norm
        bias: Tensor | None = self.bias if bn is None else bn.bias
        return bias

    @torch.no_grad()
    def shift_bias(self, correction: Tensor) -> bool:
        """Add (C,) to the output by way of a bias; `False` if the layer has none to add it to."""
        bias = self.shifted_bias()
        if bias is None:
            return False
        bias.add_(correction.to(bias))
        return True


def plain(values: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of an operation as tuples all the way down: a compiler stops at the immutable lists of a graph."""
    return tuple(plain(value) if isinstance(value, (list, tuple)) else value for value in values)


def install_layer(
    module: nn.Module,
    operation: Callable[..., Tensor],
    operation_args: Sequence[Any],
    spec: QuantizerSpec,
    channel_axis: int,
    batch_norm: nn.Module | None,
    keep_forward: bool = False,
) -> QATLayer:
    """Make a convolution or linear layer fake-quantize its weight, in place; `initialize_scale` is still to be called.

    Args:
        module: has `weight`, and `bias` (may be `None`).
        operation, operation_args: what the captured graph computes with it: `operation(x, weight, bias, *args)`.
        spec: of the weight; `axis` is `channel_axis` or `None`.
        channel_axis: output channels of the weight.
        batch_norm: what follows it and is to be folded in.
        keep_forward: its `forward` runs a graph that calls `compute`.
    """
    require_free_names(module, QATLayer)
    forget_own_forward(module)
    layer = swap_class(module, QATLayer, type(module).forward if keep_forward else None)
    layer.operation = operation
    layer.operation_args = plain(operation_args)
    layer.channel_axis = channel_axis
    layer.batch_norm_frozen = False
    layer._input_quantizer = ()
    layer._batch_norm = () if batch_norm is None else (batch_norm,)
    channels = None if spec.axis is None else layer.weight.shape[channel_axis]
    layer.weight_quantizer = FakeQuantize(spec, channels).to(layer.weight.device)
    return layer


@contextmanager
def folded_ahead(layers: Sequence[QATLayer]) -> Iterator[None]:
    """Inside, the next call of each of `layers` finds its weight there already.

    On a GPU it takes less time to launch a kernel for all of them than one for each. In several processes it does not:
    they exchange gradients while others are still to come, and these would all come last. Nor while a CUDA graph is
    recorded, which takes no table of addresses from the host.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    every = {layer: layer._fold_call(layer.has_live_norm()) for layer in layers if alone and layer.folds_ahead()}
    calls = {layer: call for layer, call in every.items() if call.is_float32()}
    try:
        for layer, weight in zip(calls, fold_together(list(calls.values())) if calls else [], strict=True):
            layer.__dict__[AHEAD] = weight
        yield
    finally:
        for layer in calls:
            layer.__dict__.pop(AHEAD, None)


def qat_layers(model: nn.Module) -> dict[str, QATLayer]:
    """All convolutions and linear layers of a prepared model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QATLayer)}


def quantizers_in_graphs(model: nn.Module) -> dict[str, FakeQuantize]:
    """All quantizers that a graph calls, by path: of activations, and of weights that are no layer's own."""
    own = {id(layer.weight_quantizer) for layer in qat_layers(model).values()}
    return {path: quantizer for path, quantizer in fake_quantizers(model).items() if id(quantizer) not in own}
