"""A batch norm that no layer precedes (DenseNet, SwiftFormer): in integers, a depthwise 1x1 convolution of its own.

Its weight is gamma / sigma and its bias beta - mean * gamma / sigma: what folding makes of a batch norm after a layer
whose weights are all 1 (Krishnamoorthi 2018 §3.2.2). While batch statistics are live, nothing is rounded: a batch norm
takes every per-channel scale back anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.quantization.class_swap import forget_own_forward, original_class, rebased, require_free_names, swap_class
from hf_qat.quantization.fake_quantize import quantize
from hf_qat.quantization.folding import fold_fake_quantize
from hf_qat.quantization.freezable_norm import KeptStatistics
from hf_qat.quantization.layers import QATLayer
from hf_qat.quantization.live_norm import is_live, normalise_live
from hf_qat.quantization.quantizer import FakeQuantize
from hf_qat.quantization.spec import QuantizerSpec


CONVOLUTIONS = {3: torch.ops.aten.conv1d.default, 4: torch.ops.aten.conv2d.default, 5: torch.ops.aten.conv3d.default}


class ChannelAffine(nn.Module):
    """What a batch norm becomes at `convert()`: `QuantizedLayer` is mixed into it."""


class QATStandaloneBatchNorm(KeptStatistics, QATLayer):
    """Mixed into the class of a batch norm by `install_standalone_norm`; parameters and statistics keep their names.

    Attributes:
        weight_shape: (C, 1, …), that of the convolution's weight.
    """

    weight_shape: tuple[int, ...]

    def compute(self, x: Tensor, arguments: tuple[Any, ...] | None = None) -> Tensor:
        """(N, C, …) → the same shape."""
        if self.leaves_scale_alone():
            return normalise_live(self, x)
        return super().compute(x, arguments)

    def leaves_scale_alone(self) -> bool:
        """While it is live: nothing is rounded."""
        return is_live(self) and not self.batch_norm_frozen

    def _folds_at_once(self) -> bool:
        return False  # its weight is the factor itself, one number a channel

    def fold_factor(self) -> Tensor:
        """gamma / sqrt(running variance + eps), (C,)."""
        bn: Any = self
        inverse = torch.rsqrt(bn.running_var + bn.eps)
        return inverse if bn.weight is None else bn.weight * inverse

    def folded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The weight, (C, 1, …), quantized at `scale` if enabled, and the bias, (C,)."""
        weight, spec = self.fold_factor(), self.weight_quantizer.spec
        if self.weight_quantizer.rounds:
            weight = fold_fake_quantize(weight, None, scale, spec.qmin, spec.qmax, 0)
        return weight.view(self.weight_shape), self.float_bias()

    def float_bias(self) -> Tensor:
        """beta - mean * gamma / sigma, (C,)."""
        bn: Any = self
        bias: Tensor = -bn.running_mean * self.fold_factor()
        return bias if bn.bias is None else bn.bias + bias

    @torch.no_grad()
    def float_weight(self) -> Tensor:
        """The weight before quantization, (C, 1, …)."""
        return self.fold_factor().view(self.weight_shape)

    @torch.no_grad()
    def codes(self, scale: Tensor) -> Tensor:
        """int32, (C, 1, …)."""
        spec = self.weight_quantizer.spec
        return quantize(self.fold_factor(), scale, None, spec.qmin, spec.qmax, spec.axis).view(self.weight_shape)

    def channel_dim(self, output: Tensor) -> int:
        """A batch norm's channels are axis 1."""
        return 1

    def restore_class(self) -> None:
        """Stop being a batch norm."""
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self._buffers.pop(name, None)
        del self.__dict__["weight_shape"]
        self.__class__ = rebased(original_class(type(self)), ChannelAffine)


def scale_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C) times (C, 1) plus (C,)."""
    x = x * weight.flatten()
    return x if bias is None else x + bias


def install_standalone_norm(
    module: nn.Module, spec: QuantizerSpec, dims: int, keep_forward: bool = False
) -> QATStandaloneBatchNorm:
    """Make a batch norm fake-quantize its weight, in place; `initialize_scale` is still to be called.

    Args:
        module: has running statistics.
        spec: of the weight; `axis` is 0 or `None`.
        dims: of its input, 2 for (N, C).
        keep_forward: its `forward` runs a graph that calls `compute`.
    """
    original, statistics = type(module), module.running_mean
    assert isinstance(statistics, Tensor)
    require_free_names(module, QATStandaloneBatchNorm)
    forget_own_forward(module)
    affine = swap_class(module, QATStandaloneBatchNorm, original.forward if keep_forward else None)
    channels = statistics.shape[0]
    affine.weight_shape = (channels, *[1] * (dims - 1))
    affine.operation = scale_channels if dims == 2 else CONVOLUTIONS[dims]
    ones = [1] * (dims - 2)
    affine.operation_args = () if dims == 2 else (ones, [0] * (dims - 2), ones, channels)
    affine.channel_axis = 0
    affine.batch_norm_frozen = False
    affine._input_quantizer = ()
    affine._batch_norm = ()
    scales = None if spec.axis is None else channels
    affine.weight_quantizer = FakeQuantize(spec, scales).to(statistics.device)
    return affine
