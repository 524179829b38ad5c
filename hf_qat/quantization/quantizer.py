"""`FakeQuantize`: one quantizer, its scale and zero point as learned parameters or as buffers, and its switches.

A learned scale is kept as its logarithm (TQT, Jain et al. 2019, §3.2): it stays positive whatever the optimizer does,
and a step of Adam changes every scale by the same ratio. Its gradient is LSQ's, by the chain rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_qat.errors import CalibrationError
from hf_qat.quantization.ddp_calls import refuse_join
from hf_qat.quantization.divergence import require_finite
from hf_qat.quantization.fake_quantize import fake_quantize, is_cheap
from hf_qat.quantization.kernels import calls_operators, fuses
from hf_qat.quantization.kernels.code_range import CodeRange
from hf_qat.quantization.kernels.cpu import compiles
from hf_qat.quantization.kernels.operators import traced_fake_quantize
from hf_qat.quantization.learned import learned_fake_quantize
from hf_qat.quantization.learned_gradients import QuantizerValues, levels
from hf_qat.quantization.observers import AVERAGING_CONSTANT, RangeCollector, make_observer, synchronized_range
from hf_qat.quantization.residuals import compact_fake_quantize
from hf_qat.quantization.saved_codes import BYTE, keep_codes_found, keep_inputs, keeps_codes
from hf_qat.quantization.scales import scale_from_range
from hf_qat.quantization.spec import QuantizerSpec
from hf_qat.quantization.transforms import refuse_transforms


#: As near to the middle of two codes, the rounding of float32 decides which of them a zero point is.
TIE = 2.0**-6

#: Activations that a quantizer with zero_point 0 and qmin 0 computes by clamping.
ACTIVATIONS = {"relu": torch.relu, "relu6": nn.functional.relu6}


class FakeQuantize(nn.Module):
    """Rounds a tensor to the values that its integer codes can represent; the codes themselves stay implicit.

    Args:
        spec: what the codes are.
        channels: number of scales, `None` for one.
        scale_limit: upper bound of the scale: a quantizer that computes ReLU6 must not reach beyond 6.

    Attributes:
        enabled: quantize at all.
        waits: hand values on in training, and round in evaluation only: a net from scratch learns in float at first.
        frozen: scale and zero point no longer change.
        observer: collects the range while calibrating, else `None`.
        path: of this module when its model was prepared, for messages.
        lr_multiplier: of the learning rate of scale and offset, as the recipe of that model says.
        observed (buffer): int64, number of batches seen; 0 means that the ranges are still to be collected.
    """

    log2_scale: Tensor
    offset: Tensor
    observed: Tensor
    range_min: Tensor
    range_max: Tensor

    def __init__(self, spec: QuantizerSpec, channels: int | None = None, scale_limit: float | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.scale_limit = scale_limit
        self.enabled = True
        self.waits = False
        self.frozen = False
        self.path = ""
        self.lr_multiplier = 1.0
        self.observer: RangeCollector | None = None
        self.learned = spec.learned and spec.fixed_scale is None
        shape = () if channels is None else (channels,)
        self._add("log2_scale", torch.full(shape, math.log2(spec.fixed_scale or 1.0), dtype=torch.float32))
        if not spec.symmetric:
            # In units of the whole range, so that a step of the optimizer means the same at 4 and at 8 bits.
            self._add("offset", torch.tensor(0.5, dtype=torch.float32))
        if self.tracks_range:
            self.register_buffer("range_min", torch.tensor(0.0, dtype=torch.float32))
            self.register_buffer("range_max", torch.tensor(0.0, dtype=torch.float32))
        self.register_buffer("observed", torch.tensor(0, dtype=torch.int64))

    def _add(self, name: str, value: Tensor) -> None:
        if self.learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def rounds(self) -> bool:
        """Whether it quantizes, in its present mode."""
        return self.enabled and not (self.waits and self.training)

    @property
    def tracks_range(self) -> bool:
        """Whether training goes on following the range of what passes (a moving average)."""
        return self.spec.observer == "moving_average" and not self.spec.learned and self.spec.fixed_scale is None

    def wants_range(self) -> bool:
        """Whether calibration is to set the range: a frozen one stays, unless nothing has been seen yet."""
        return not self.frozen or int(self.observed) == 0

    def lacks_range(self) -> bool:
        """Whether `forward` would round by a range that nothing has been seen for."""
        known = self.spec.fixed_scale is not None or (self.training and self.tracks_range)
        seen = known or self.observed.is_meta or int(self.observed) > 0  # on the meta device, nobody knows
        return self.rounds and not seen

    @property
    def scale(self) -> Tensor:
        """() or (C,) float32, positive; differentiable where learned."""
        scale = self._unlimited_scale()
        if self.scale_limit is None:
            return scale
        if not scale.requires_grad:
            return scale.clamp(max=self.scale_limit)
        # Straight through: above the limit the gradient must still be able to lead back. What is added is 0.
        return scale.detach().clamp(max=self.scale_limit) + (scale - scale.detach())

    def _unlimited_scale(self) -> Tensor:
        exponent = self.log2_scale
        if self.spec.power_of_two:
            exponent = exponent + (exponent.detach().round() - exponent.detach())
        return torch.exp2(exponent)

    @property
    def zero_point(self) -> Tensor | None:
        """() float32, rounded where used; `None` for 0."""
        return None if self.spec.symmetric else self._zero_point_of(self.offset)

    def _zero_point_of(self, offset: Tensor) -> Tensor:
        return torch.rsub(offset.clamp(0.0, 1.0), self.spec.qmin, alpha=self.spec.qmin - self.spec.qmax)

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Set the scale, () or (C,), and the zero point, in codes; a fixed scale stays."""
        if self.spec.fixed_scale is None:
            self.log2_scale.copy_(torch.log2(scale.to(self.log2_scale)))
        if zero_point is not None and not self.spec.symmetric:
            span = self.spec.qmax - self.spec.qmin
            self.offset.copy_((zero_point.to(self.offset) - self.spec.qmin) / span)

    def start_observing(self) -> None:
        """Collect ranges from what passes, in float, until `finish_observing`."""
        self.observer = None if self.spec.fixed_scale is not None else make_observer(self.spec)

    def finish_observing(self, path: str) -> None:
        """Set scale and zero point by what was collected, over all ranks.

        Raises:
            CalibrationError: nothing passed, or values that are not finite; `path` names the quantizer.
        """
        observer, self.observer = self.observer, None
        if observer is None:
            self.observed.fill_(1)
            return
        try:
            observer.synchronize()
            scale, zero_point = observer.qparams()
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from error
        self.set_qparams(scale, zero_point)
        if self.tracks_range:
            self._remember_range(scale, zero_point)
        self.observed.fill_(1)

    @torch.no_grad()
    def _remember_range(self, scale: Tensor, zero_point: Tensor) -> None:
        self.range_min.copy_((self.spec.qmin - zero_point) * scale)
        self.range_max.copy_((self.spec.qmax - zero_point) * scale)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Fake-quantize `x`, after `activation`, which costs nothing where the clamp computes it.

        Raises:
            NonFiniteError: scale or offset is none any more; not where reading them would wait for a GPU.
            TransformError: it cannot go through a transform of functions.
        """
        if self.observer is not None or not self.rounds:
            x = x if activation is None else ACTIVATIONS[activation](x)
            if self.observer is not None:
                self.observer.observe(x.detach())
            return x
        refuse_transforms()
        require_finite(self.path, self.log2_scale, None if self.spec.symmetric else self.offset)
        if activation is not None and not self.absorbs(activation):
            x = ACTIVATIONS[activation](x)
        if self.training and not self.frozen and self.tracks_range:
            self._follow(x.detach())
        if keeps_codes() and 1 < self.spec.qmax - self.spec.qmin < BYTE:
            return self._compact(x)
        if fuses(x):
            return self._fused(x)
        if torch.is_grad_enabled() and (self.learned and not self.frozen or compiles(x)):
            arguments = x, *self._trained(), self._levels()
            if calls_operators(x):
                return traced_fake_quantize(*arguments, self._codes())
            return learned_fake_quantize(*arguments)
        fixed = x, self.scale, self.zero_point, self.spec.qmin, self.spec.qmax
        return keep_inputs(fake_quantize(*fixed), fake_quantize, *fixed)

    def _trained(self) -> tuple[Tensor, Tensor | None]:
        """`log2_scale` and `offset`, if any, as a function takes them that computes gradients of what is learned."""
        if not self.learned or self.frozen:
            return self.log2_scale.detach(), None
        return self.log2_scale, None if self.spec.symmetric else self.offset

    def _compact(self, x: Tensor) -> Tensor:
        """The same, with codes, and less kept for backward."""
        if self.spec.fixed_scale is not None:  # softmax and sigmoid keep what they put out
            out = fake_quantize(x, self.scale, self.zero_point, self.spec.qmin, self.spec.qmax)
            values = self._levels()
            keep_codes_found(out, values.scale, values.low, values.span)
            return out
        return compact_fake_quantize(x, *self._trained(), self._levels())

    def _fused(self, x: Tensor) -> Tensor:
        """The same as one kernel each way, which takes the parameters themselves."""
        from hf_qat.quantization.kernels.activation import fused_fake_quantize, quantize

        arguments = x, *self._kernel_parameters()
        return keep_inputs(fused_fake_quantize(*arguments), quantize, *arguments)

    def _kernel_parameters(self) -> tuple[Tensor, Tensor | None, CodeRange]:
        if self.tracks_range:  # the next batch moves its parameters, perhaps before the backward of this one
            return self.scale, self.zero_point, CodeRange(self.spec.qmin, self.spec.qmax, logarithmic=False)
        scale, offset = self.log2_scale, None if self.spec.symmetric else self.offset
        if self.frozen:
            scale, offset = scale.detach(), offset if offset is None else offset.detach()
        return scale, offset, self._codes()

    def _codes(self) -> CodeRange:
        limit = math.inf if self.scale_limit is None else self.scale_limit
        return CodeRange(self.spec.qmin, self.spec.qmax, power_of_two=self.spec.power_of_two, scale_limit=limit)

    def _levels(self) -> QuantizerValues:
        spec, exponent = self.spec, self.log2_scale.detach()
        scale = unlimited = torch.exp2(exponent.round() if spec.power_of_two else exponent)
        limit = self.scale_limit
        if limit is not None and not (is_cheap(scale) and float(scale) <= limit):  # an operation takes its time
            scale = unlimited.clamp(max=limit)
        zero_point = None if spec.symmetric else self._rounded_zero_point()
        return levels(scale, unlimited, zero_point, spec.qmin, spec.qmax)

    def _rounded_zero_point(self) -> Tensor | float:
        """As a number where reading it costs nothing: PyTorch's operations take longer than all else that is done."""
        spec, offset = self.spec, self.offset.detach()
        if is_cheap(offset):
            zero_point = spec.qmin + min(max(offset.item(), 0.0), 1.0) * (spec.qmax - spec.qmin)
            if abs(zero_point - math.floor(zero_point) - 0.5) > TIE:
                return float(round(zero_point))
        return self._zero_point_of(offset).round()

    def absorbs(self, activation: str) -> bool:
        """Whether clamping the codes at 0 (and at `scale_limit`) is the activation, in value and gradient."""
        lower = self.spec.qmin == 0 and self.spec.symmetric
        return lower and (activation == "relu" or self.scale_limit is not None)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Move the running range towards that of `x`, alike on all ranks, and set the scale by it.

        A batch with NaN or infinity in `x`, or without any value, is left out, as if it had not been.
        """
        refuse_join()
        x = x if x.numel() else x.new_full((1,), torch.nan)
        # Every range contains 0; behind a ReLU that the clamp computes, none is below.
        high = x.amax().float().clamp_min(0.0)
        # Codes from 0 on say nothing of what is below. Two reductions are faster than `aminmax` on a CPU.
        low = torch.zeros_like(high) if self.spec.symmetric and self.spec.qmin == 0 else x.amin().float()
        finite = torch.isfinite(high - low)
        low, high = torch.where(finite, low, torch.inf), torch.where(finite, high, -torch.inf)
        low, high = synchronized_range(low, high)
        finite = torch.isfinite(high - low)  # of one rank at least; no `if`, which would wait for the device
        weight = (1 - self.observed).to(self.range_min).clamp_min(AVERAGING_CONSTANT)  # 1 for the first batch
        for end, reached in ((self.range_min, low), (self.range_max, high)):
            end.lerp_(torch.where(finite, reached.to(end), end), weight)
        self.observed.add_(finite)
        self.set_qparams(*scale_from_range(self.range_min, self.range_max, self.spec))

    def extra_repr(self) -> str:
        """The spec in a line: `uint8, per tensor, learned`."""
        spec = self.spec
        kind = f"{'int' if spec.signed else 'uint'}{spec.bits}"
        parts = [kind, "per tensor" if spec.axis is None else "per channel"]
        parts += ["affine"] if not spec.symmetric else []
        parts += ["power of two"] if spec.power_of_two else []
        parts += [f"fixed scale {spec.fixed_scale}"] if spec.fixed_scale else ["learned"] if self.learned else []
        return ", ".join(parts)


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """All quantizers of `model`, by path, in the order of its modules."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FakeQuantize)}
