"""Part of `gpu.py`: Triton's kernels against torch on the same device, and their speed against a plain copy.

In Triton's interpreter (`TRITON_INTERPRET=1 python tests/benchmarks/gpu.py --device cpu --tiny --only correctness`)
values in bfloat16 are cut off, not rounded, so that many count as wrong; those in float32 must be right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat import calibrate, freeze_batch_norm, prepare_qat
from hf_qat.quantization import kernels
from hf_qat.quantization.kernels.code_range import CodeRange
from hf_qat.quantization.kernels.folding import FoldCall, Folding, Norm
from hf_qat.quantization.layer_folding import fold_layer, fold_together


Add = Callable[..., None]

#: Log2 of the scale, offset (`None`: symmetric), lowest and highest code, limit of the scale, exponent rounded.
QUANTIZERS = {
    "int8": (-4.3, None, -128, 127, math.inf, False),
    "uint8": (-4.6, 0.37, 0, 255, math.inf, False),
    "uint4": (-1.1, 0.52, 0, 15, math.inf, False),
    "zero point beyond the codes": (-4.0, 1.25, 0, 255, math.inf, False),
    "relu6": (-3.0, None, 0, 255, 6 / 255, False),
    "power of two": (-4.3, None, -128, 127, math.inf, True),
    "uint16": (-12.7, 0.5, 0, 65535, math.inf, False),
}

SHAPES = {
    "one": (1,),
    "odd": (3, 5, 7, 11),
    "large": (8, 64, 56, 56),
    "larger than one turn": (2**23 + 5,),
    "empty": (0, 4),
    "scalar": (),
}
TINY_SHAPES = {"odd": (3, 5, 7, 11), "empty": (0, 4)}


def check(add: Add, device: torch.device, tiny: bool) -> None:
    """A row for each thing that must hold; `wrong` and `error` say by how much it does not."""
    if not kernels.fuses(torch.zeros(1, device=device)):
        add(part="correctness", what="Triton is not there", wrong=0)
        return
    _check_exponentials(add, device, 200 if tiny else 2000)
    _check_activations(add, device, TINY_SHAPES if tiny else SHAPES)
    _check_weights(add, device, tiny)
    _check_weights_together(add, device)
    _check_model(add, device)


def _exp2_of_kernels(exponents: Tensor) -> Tensor:
    """2**x as the kernels have it, which may be an ulp off: a row of its own says how often it is."""
    large = torch.full((exponents.numel(), 1), 1e30, device=exponents.device)
    folding = Folding(-1, 1, 0, False, False, 0.0, torch.float32)
    return fold_layer(large, exponents.detach().reshape(-1), None, folding)[0].reshape(exponents.shape)


def _check_exponentials(add: Add, device: torch.device, count: int) -> None:
    """2**x and 1/sqrt(x) are the device's own."""
    exponents = torch.empty(count, device=device).uniform_(-30, 10)
    exponents[:60] = torch.arange(-40, 20, device=device)
    scales, expected = _exp2_of_kernels(exponents), torch.exp2(exponents)
    add(part="correctness", what="exp2", wrong=int((scales != expected).sum()), of=count)
    add(part="correctness", what="exp2 of whole numbers", wrong=int((scales != expected)[:60].sum()))
    channels = 64 if count < 1000 else 4096
    variance, ones = torch.rand(channels, device=device) * 3, torch.ones(channels, device=device)
    folding = Folding(-127, 127, 0, False, False, 1e-5, torch.float32)
    _, bias = fold_layer(
        torch.ones(channels, 1, device=device), ones, Norm(-ones, variance, None, None, None), folding
    )
    assert bias is not None
    add(part="correctness", what="rsqrt", wrong=int((bias != torch.rsqrt(variance + 1e-5)).sum()), of=channels)


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values, laid out in several ways."""
    found = {"contiguous": x}
    if x.dim() == 4:
        found["channels_last"] = x.contiguous(memory_format=torch.channels_last)
        found["permuted"] = x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
        found["strided"] = torch.stack([x, x], -1)[..., 0]
    return found


def _check_activations(add: Add, device: torch.device, shapes: dict[str, tuple[int, ...]]) -> None:
    from hf_qat.quantization.kernels.activation import fused_fake_quantize

    for name, (log2, start, qmin, qmax, limit, rounded) in QUANTIZERS.items():
        wrong = wrong_gradient = runs_differ = layouts_lost = cases = 0
        worst = 0.0
        for shape, dtype in itertools.product(shapes.values(), (torch.float32, torch.bfloat16, torch.float16)):
            for layout, data in _layouts((torch.randn(shape, device=device) * 6).to(dtype)).items():
                x = data.detach().requires_grad_()
                log2_scale = torch.tensor(log2, device=device, requires_grad=True)
                offset = None if start is None else torch.tensor(start, device=device, requires_grad=True)
                inputs = [x, log2_scale] + ([] if offset is None else [offset])
                codes = CodeRange(qmin, qmax, True, rounded, limit)
                incoming = torch.randn_like(data)
                out = fused_fake_quantize(x, log2_scale, offset, codes)
                found = torch.autograd.grad(out, inputs, incoming, retain_graph=True)
                again = torch.autograd.grad(out, inputs, incoming)
                values, gradients, sizes = _by_torch(x, incoming, log2_scale, offset, codes)
                cases += 1
                wrong += int((out != values).sum())
                wrong_gradient += int((found[0] != gradients[0]).sum())
                runs_differ += sum(not torch.equal(a, b) for a, b in zip(found, again, strict=True))
                layouts_lost += layout != "strided" and out.stride() != data.stride()
                for a, b, size in zip(found[1:], gradients[1:], sizes, strict=True):
                    worst = max(worst, float((a.double() - b).abs() / (size + 1e-30)))
        add(
            part="correctness",
            what=f"activation {name}",
            cases=cases,
            wrong=wrong,
            wrong_gradient=wrong_gradient,
            runs_differ=runs_differ,
            layouts_lost=layouts_lost,
            error=worst,
        )


def _by_torch(
    x: Tensor, grad: Tensor, log2_scale: Tensor, offset: Tensor | None, codes: CodeRange
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Values in float32, gradients of the parameters in float64, and the sums of the magnitudes they sum up."""
    with torch.no_grad():
        scale = _exp2_of_kernels(log2_scale.round() if codes.power_of_two else log2_scale)
        unlimited, scale = scale, scale.clamp(max=codes.scale_limit)
        span, zero = codes.qmax - codes.qmin, torch.zeros_like(scale)
        if offset is not None:
            zero = (offset.clamp(0, 1) * span + codes.qmin).round()
        low, high = codes.qmin - zero, codes.qmax - zero
        y = x.float() / scale
        out = torch.clamp(y.round(), low, high) * scale
        inside = (y > low) & (y < high)
        terms = grad.double() * (out - torch.where(inside, x.float(), 0.0)).double()
        ratio = math.log(2) * float(unlimited / scale)
        gradients, sizes = [torch.where(inside, grad, 0.0), terms.sum() * ratio], [terms.abs().sum() * ratio]
        if offset is not None:
            outside = torch.where(inside, 0.0, grad).double() * float(scale) * span
            led_away = float(offset - offset.clamp(0, 1)) * float(-outside.sum()) < 0
            gradients.append(-outside.sum() * (not led_away))
            sizes.append(outside.abs().sum())
    return out.to(x.dtype), gradients, sizes


def _check_weights(add: Add, device: torch.device, tiny: bool) -> None:
    shapes = [(9, 6, 3, 3)] if tiny else [(64, 32, 3, 3), (9, 1, 3, 3), (7, 300, 5, 5), (33, 130), (512, 2048, 1, 1)]
    for kind in ("plain", "folded", "live"):
        wrong = runs_differ = cases = 0
        errors = [0.0] * 6
        for shape, axis, layout, per_channel in itertools.product(shapes, [0, 1], [0, 1], [True, False]):
            case = _WeightCase(shape, axis, kind, per_channel, device)
            if layout and len(shape) == 4:
                case.leaves[0] = case.leaves[0].contiguous(memory_format=torch.channels_last)
            out, bias, found = case.by_triton()
            values, bias_values, expected = case.by_torch()
            cases += 1
            wrong += int((out != values).sum())
            runs_differ += sum(not torch.equal(a, b) for a, b in zip(found, case.by_triton()[2], strict=True))
            if bias is not None:
                errors[5] = max(errors[5], float((bias - bias_values).detach().abs().max()))
            for i, (ours, (theirs, size)) in enumerate(zip(found, expected, strict=True)):
                errors[i] = max(errors[i], float(((ours.double() - theirs).abs() / (size + 1e-30)).max()))
        names = ("weight_error", "scale_error", "gamma_error", "beta_error", "bias_grad_error", "bias_error")
        add(
            part="correctness",
            what=f"weight {kind}",
            cases=cases,
            wrong=wrong,
            runs_differ=runs_differ,
            **dict(zip(names, errors, strict=True)),
        )


def _check_weights_together(add: Add, device: torch.device) -> None:
    """Many weights in one launch are those of a launch each, and so are the gradients."""
    shapes = [((9, 6, 3, 3), 0), ((33, 13), 0), ((5, 6, 2, 2), 1), ((64, 32, 1, 1), 0)]
    for kind in ("plain", "folded", "live"):
        cases = [_WeightCase(shape, axis, kind, True, device) for shape, axis in shapes]
        results = []
        for together in (True, False):
            leaves = [[leaf.detach().requires_grad_() for leaf in case.leaves] for case in cases]
            calls = [case.call(own) for case, own in zip(cases, leaves, strict=True)]
            pairs = fold_together(calls) if together else [fold_layer(*call) for call in calls]
            for (weight, bias), case in zip(pairs, cases, strict=True):
                outputs, grads = (
                    ([weight], [case.grad]) if bias is None else ([weight, bias], [case.grad, case.bias_grad])
                )
                torch.autograd.backward(outputs, grads, retain_graph=True)
            found = [weight for weight, _ in pairs] + [x.grad for own in leaves for x in own if x.grad is not None]
            results.append(found)
        errors = [float((a - b).detach().abs().max() / (b.abs().max() + 1e-30)) for a, b in zip(*results, strict=True)]
        add(part="correctness", what=f"weights together {kind}", compared=len(errors), error=max(errors))


class _WeightCase:
    """A weight, a batch norm, and incoming gradients."""

    def __init__(self, shape: tuple[int, ...], axis: int, kind: str, per_channel: bool, device: torch.device) -> None:
        self.kind, self.axis, channels = kind, axis, shape[axis]
        scales = torch.empty((channels,) if per_channel else (), device=device).uniform_(-6.5, -5)
        gamma, beta, bias, self.mean = torch.randn(4, channels, device=device).unbind()
        self.leaves = [torch.randn(shape, device=device), scales, gamma, beta, bias]
        self.variance = torch.rand(channels, device=device) + 0.5
        self.grad, self.bias_grad = torch.randn(shape, device=device), torch.randn(channels, device=device)

    def call(self, leaves: list[Tensor]) -> FoldCall:
        """What folds `leaves`."""
        norm = None if self.kind == "plain" else Norm(self.mean, self.variance, *leaves[2:])
        folding = Folding(-127, 127, self.axis, False, self.kind == "live", 1e-5, torch.float32)
        return FoldCall(leaves[0], leaves[1], norm, folding)

    def by_triton(self) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Weight, bias, and the gradients of the leaves that get one."""

        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        out, bias = fold_layer(*self.call(leaves))
        outputs, grads = ([out], [self.grad]) if bias is None else ([out, bias], [self.grad, self.bias_grad])
        return out, bias, list(torch.autograd.grad(outputs, leaves if bias is not None else leaves[:2], grads))

    def by_torch(self) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Values in float32; gradients in float64, each with the sum of the magnitudes that it sums up."""
        weight, log2_scale, gamma, beta, bias = self.leaves
        others = [d for d in range(weight.dim()) if d != self.axis]
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        scale, inverse = _exp2_of_kernels(log2_scale).expand(gamma.shape), torch.rsqrt(self.variance + 1e-5)
        factor = gamma * inverse
        step = scale / factor if self.kind == "live" else scale
        y = weight / scale.view(shape) if self.kind == "plain" else weight * (factor / scale).view(shape)
        codes, inside = y.round().clamp(-127, 127), (y > -127) & (y < 127)
        grad = self.grad.double()
        passed = torch.where(inside, grad, 0.0)
        dweight = passed * factor.double().view(shape) if self.kind == "folded" else passed
        terms = grad * (codes - torch.where(inside, y, 0.0)).double() * step.double().view(shape) * math.log(2)
        over = list(range(weight.dim())) if log2_scale.dim() == 0 else others
        results = [(dweight, dweight.abs()), (terms.sum(over), terms.abs().sum(over))]
        if self.kind == "folded":
            products, shift = passed * weight, (self.mean - bias).double()
            dgamma = (products.sum(others) - self.bias_grad * shift) * inverse
            size = (products.abs().sum(others) + (self.bias_grad * shift).abs()) * inverse
            dbias = self.bias_grad.double() * factor
            results += [(dgamma, size), (self.bias_grad.double(), self.bias_grad.abs()), (dbias, dbias.abs())]
        return codes * step.view(shape), beta - (self.mean - bias) * factor, results


def _check_model(add: Add, device: torch.device) -> None:
    """Loss and gradients of a small net, with the kernels and without, in float32."""
    torch.manual_seed(0)
    block = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)]
    model = nn.Sequential(*block, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).to(device)
    x = torch.randn(16, 3, 16, 16, device=device)
    calibrate(prepare_qat(model, example_inputs=x[:2]), [x])
    for frozen in (False, True):
        freeze_batch_norm(model.train(), frozen)
        results = []
        for fused in (True, False):
            saved, kernels._works = kernels._works, kernels._works if fused else lambda device: False  # type: ignore[assignment]
            try:
                loss = model(x).square().mean()
                names = [name for name, p in model.named_parameters() if p.requires_grad]
                gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            finally:
                kernels._works = saved
            results.append((loss.detach(), dict(zip(names, gradients, strict=True))))
        (loss, ours), (other, theirs) = results
        errors = {name: float((ours[name] - g).norm() / (g.norm() + 1e-12)) for name, g in theirs.items()}
        worst = max(errors, key=errors.__getitem__)
        add(
            part="correctness",
            what=f"model, batch norm {'frozen' if frozen else 'live'}",
            loss=float(loss),
            loss_error=float((loss - other).abs() / other),
            error=errors[worst],
            worst=worst,
        )


def speed(add: Add, device: torch.device, tiny: bool) -> None:
    """Milliseconds of the kernels for 103 M values, beside a copy."""
    if device.type != "cuda":
        return
    for dtype in (torch.float32, torch.bfloat16):
        _time(add, torch.randn(128, 64, 112, 14 if tiny else 112, device=device).to(dtype))


def _time(add: Add, x: Tensor) -> None:
    from hf_qat.quantization.kernels.activation import quantize, quantize_backward

    codes, log2_scale = CodeRange(0, 255), torch.tensor(-4.6, device=x.device)
    offset, grad, out = torch.tensor(0.4, device=x.device), torch.randn_like(x), torch.empty_like(x)

    def backward(wants_sums: bool) -> Callable[[], Any]:
        return lambda: quantize_backward(grad, x, log2_scale, offset, codes, True, wants_sums)

    add(
        part="bandwidth",
        dtype=str(x.dtype),
        values=x.numel(),
        copy_ms=_milliseconds(lambda: out.copy_(x)),
        forward_ms=_milliseconds(lambda: quantize(x, log2_scale, offset, codes)),
        backward_ms=_milliseconds(backward(True)),
        backward_frozen_ms=_milliseconds(backward(False)),
    )


def _milliseconds(call: Callable[[], Any]) -> float:
    import triton

    return float(triton.testing.do_bench(call, warmup=20, rep=100, return_mode="median"))
