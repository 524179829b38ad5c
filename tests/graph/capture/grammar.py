"""Random small modules: rules of a grammar, each a sentence of PyTorch that people write, put one after the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


CHANNELS, SIZE = 4, 6

#: (N, C, H, W) → the same shape; it may look at its owner, the whole module.
Step = Callable[["Sentence", Tensor], Tensor]


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return -gradient


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient does not."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Attention(nn.Module):
    """Over pixels, dropout included."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return mixed.transpose(1, 2).reshape(x.shape)


class ProductAttention(nn.Module):
    """`scaled_dot_product_attention`, its dropout an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0)
        return mixed.transpose(1, 2).reshape(x.shape)


class StochasticDepth(nn.Module):
    """Drops a branch image by image (Huang 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.training:
            keep = 0.7 + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
            y = y.div(0.7) * keep.floor_()
        return x + y


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Centre(nn.Module):
    """A running mean that forward keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.centre.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
        return x - self.centre.clone().view(1, -1, 1, 1)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Precise(nn.Module):
    """A region that does not take part in mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.float())


class Frozen(nn.Module):
    """A region without gradients, which may hold one with them."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.inner, self.conv, self.second = inner, nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
            if self.inner:
                with torch.enable_grad():
                    y = self.second(y)
        return x + y


class Squeeze(nn.Module):
    """Squeeze and excitation (Hu 2018), in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3))).sigmoid_()[:, :, None, None]


class Residual(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.conv = in_place, nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=in_place)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.in_place:
            y += x
        else:
            y = y + x
        return self.act(y)


def layer(make: Callable[[], nn.Module]) -> Callable[[random.Random], nn.Module | Step]:
    return lambda generator: make()


def step(function: Step) -> Callable[[random.Random], nn.Module | Step]:
    return lambda generator: function


def view_and_write(owner: Sentence, x: Tensor) -> Tensor:
    y = x * 1.5
    view = y.flatten(1)
    y += 1
    return view.view(x.shape)


def write_through_a_slice(owner: Sentence, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] *= 2
    return y


def write_through_a_transpose(owner: Sentence, x: Tensor) -> Tensor:
    y = x.clone()
    y.transpose(1, 2)[:, :, 0] += 1.0
    return y


def write_through_a_narrow(owner: Sentence, x: Tensor) -> Tensor:
    y = x + 0.5
    y.narrow(1, 2, 2).mul_(3)
    return y


def write_through_a_select(owner: Sentence, x: Tensor) -> Tensor:
    y = x + 0.5
    y.select(1, 0).add_(1)
    return y


def write_by_a_mask(owner: Sentence, x: Tensor) -> Tensor:
    y = x.clone()
    y[y < 0] = 0.1
    return y


def relu_of_a_view(owner: Sentence, x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(y.shape[0], -1)
    y.relu_()
    return view.reshape(x.shape)


def fill_an_output(owner: Sentence, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :2] = x[:, 2:]
    out[:, 2:] = x[:, :2] * 2
    return out


def batch_branch(owner: Sentence, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 1 else x - 1


def odd_batch_branch(owner: Sentence, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] % 2 else x


def training_branch(owner: Sentence, x: Tensor) -> Tensor:
    return x.tanh() if owner.training else x.sigmoid()


def functional_dropout(owner: Sentence, x: Tensor) -> Tensor:
    return functional.dropout(x, 0.3, owner.training)


def functional_dropout_in_place(owner: Sentence, x: Tensor) -> Tensor:
    return functional.dropout(x * 1.0, 0.3, owner.training, inplace=True)


def tensor_hook(owner: Sentence, x: Tensor) -> Tensor:
    y = x * 1.5
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.5)
    return y


def detached_gate(owner: Sentence, x: Tensor) -> Tensor:
    return x * x.detach().sigmoid()


def split_and_joined(owner: Sentence, x: Tensor) -> Tensor:
    return torch.cat([part * (k + 1) for k, part in enumerate(x.split(2, 1))], 1)


#: Rule → how to make one. Common ones stand several times.
COMMON: list[Callable[[random.Random], nn.Module | Step]] = [
    layer(lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
    layer(lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2, bias=False)),
    layer(lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect")),
    layer(lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1)),
    layer(lambda: nn.Linear(SIZE, SIZE)),
    layer(lambda: nn.BatchNorm2d(CHANNELS)),
    layer(lambda: nn.BatchNorm2d(CHANNELS, affine=False)),
    layer(lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
    layer(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True))),
    layer(lambda: nn.LayerNorm([CHANNELS, SIZE, SIZE])),
    layer(lambda: nn.GroupNorm(2, CHANNELS)),
    layer(lambda: nn.InstanceNorm2d(CHANNELS)),
    layer(lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True)),
    lambda generator: generator.choice([nn.ReLU, nn.Hardswish, nn.SiLU, nn.LeakyReLU])(
        inplace=generator.random() < 0.5
    ),
    layer(nn.GELU),
    layer(lambda: nn.PReLU(CHANNELS)),
    layer(nn.RReLU),
    layer(lambda: nn.MaxPool2d(3, 1, 1)),
    layer(lambda: nn.AvgPool2d(3, 1, 1)),
    layer(Squeeze),
    lambda generator: Residual(generator.random() < 0.5),
    layer(lambda: nn.Dropout(0.3)),
    layer(lambda: nn.Dropout(0.3, inplace=True)),
    layer(lambda: nn.Dropout2d(0.3)),
    layer(lambda: nn.AlphaDropout(0.3)),
    layer(lambda: nn.FeatureAlphaDropout(0.3)),
    step(functional_dropout),
    step(functional_dropout_in_place),
    layer(Attention),
    layer(ProductAttention),
    layer(StochasticDepth),
    layer(Noise),
    layer(Centre),
    layer(Counter),
    layer(Precise),
    lambda generator: Frozen(generator.random() < 0.5),
    step(view_and_write),
    step(write_through_a_slice),
    step(write_through_a_transpose),
    step(write_through_a_narrow),
    step(write_through_a_select),
    step(relu_of_a_view),
    step(fill_an_output),
    step(training_branch),
    step(detached_gate),
    step(split_and_joined),
]

#: What a graph cannot hold: the module's own Python has to go on.
RARE: list[Callable[[random.Random], nn.Module | Step]] = [
    step(write_by_a_mask),
    step(batch_branch),
    step(odd_batch_branch),
    step(tensor_hook),
    step(lambda owner, x: Reversed.apply(x)),
    step(lambda owner, x: StraightThrough.apply(x * 3)),
]

#: How a module returns what it has.
RESULTS = ("one", "one", "tuple", "dict", "auxiliary", "logits")


@dataclass(frozen=True)
class Outline:
    """What a seed says of a module."""

    result: str
    shared: bool
    hook: str | None


class Sentence(nn.Module):
    """Steps one after the other, pooling, and a linear layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = random.Random(seed)
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.parts, self.order = nn.ModuleList(), []
        for _ in range(generator.randint(1, 5)):
            rules = RARE if generator.random() < 0.06 else COMMON
            part = generator.choice(rules)(generator)
            if isinstance(part, nn.Module):
                self.parts.append(part)
                self.order.append(len(self.parts) - 1)
            else:
                self.order.append(part)
        self.head = nn.Linear(CHANNELS, 5)
        hook = generator.choice(["forward", "pre", "backward"]) if generator.random() < 0.08 else None
        self.outline = Outline(generator.choice(RESULTS), generator.random() < 0.15, hook)
        if self.outline.hook and len(self.parts):
            _add_hook(self.parts[0], self.outline.hook)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        for part in self.order * (2 if self.outline.shared else 1):
            y = self.parts[part](y) if isinstance(part, int) else part(self, y)
        logits = self.head(y.mean((2, 3)))
        if self.outline.result == "tuple":
            return logits, y
        if self.outline.result == "dict":
            return {"logits": logits, "features": [y]}
        if self.outline.result == "auxiliary" and self.training:
            return logits, self.head(y.amax((2, 3)))
        if self.outline.result == "logits" and not self.training:
            return logits.softmax(-1)
        return logits


def _add_hook(module: nn.Module, kind: str) -> None:
    if kind == "forward":
        module.register_forward_hook(lambda module, inputs, output: output * 1.25)
    elif kind == "pre":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.25,))
    else:
        module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
