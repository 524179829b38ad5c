"""Which layers feed an output, worked out by hand on small networks; the first layer is part `0` of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_qat.graph.capture.capture import capture
from hf_qat.graph.edges import find_edges
from hf_qat.graph.plan import Edges


X = torch.randn(2, 4, 6, 6)


class Network(nn.Module):
    def __init__(self, function: Callable[..., object], layers: int = 4) -> None:
        super().__init__()
        self.part = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers))
        self.norm = nn.BatchNorm2d(4)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self, *self.part, x)


def edges(function: Callable[..., object], excluded: Callable[[str], bool] = lambda path: False) -> Edges:
    model = Network(function).eval()
    return find_edges(model, capture(model, X), X, excluded)


def joined(m, a, b, c, d, x):
    x = a(x)
    return torch.cat([b(x), torch.relu(c(x)).flip(3), d(x)], 1)


def hidden_too(m, a, b, c, d, x):
    hidden = torch.relu(m.norm(b(a(x))))
    return hidden, d(c(hidden))


def normalised_hidden_too(m, a, b, c, d, x):
    hidden = functional.layer_norm(b(a(x)), (6,))
    return hidden, d(c(hidden))


def only_the_size(m, a, b, c, d, x):
    return functional.interpolate(c(a(x)), size=b(x)[:, :, 1:].shape[-2:]) + 0 * a(x).mean()


LAST = {
    "chain": (lambda m, a, b, c, d, x: d(c(b(a(x)))), "3"),
    "activation and resize after it": (
        lambda m, a, b, c, d, x: functional.interpolate(
            torch.sigmoid(d(c(b(a(x))))), scale_factor=2.0, mode="bilinear"
        ),
        "3",
    ),
    "residual": (lambda m, a, b, c, d, x: (y := c(b(a(x)))) + d(y), "3"),
    "projection in parallel": (lambda m, a, b, c, d, x: c(b(y := a(x))) + d(y), "23"),
    "heads, concatenated": (joined, "123"),
    "two outputs": (lambda m, a, b, c, d, x: {"scores": c(y := b(a(x))), "boxes": d(y).sigmoid()}, "23"),
    "a hidden value that is returned, too": (hidden_too, "13"),
    "a hidden value that is normalised first": (normalised_hidden_too, "3"),
    "one layer, called twice": (lambda m, a, b, c, d, x: b(torch.relu(b(a(x)))), "1"),
    "sizes alone": (only_the_size, "02"),
    "product of two layers": (lambda m, a, b, c, d, x: c(y := a(x)) * torch.sigmoid(d(y)), "23"),
}


@pytest.mark.parametrize(("function", "last"), LAST.values(), ids=LAST)
def test_the_layers_that_feed_an_output(function, last):
    found = edges(function)
    assert found.last_layers == {f"part.{digit}" for digit in last}
    assert found.first_layer == "part.0"
    assert found.inputs == {("", 0)}


def test_every_output_of_a_plain_model_is_one_of_the_model():
    assert edges(hidden_too).outputs == {("", 0), ("", 1)}


def test_an_excluded_layer_is_neither_first_nor_last():
    found = edges(LAST["chain"][0], lambda path: path in ("part.0", "part.3"))
    assert (found.first_layer, found.last_layers) == ("part.1", {"part.2"})


def test_without_layers_there_is_no_first_one():
    assert edges(lambda m, *rest: rest[-1] + 1.0) == Edges(
        inputs=frozenset({("", 0)}), outputs=frozenset({("", 0)}), first_layer=None, last_layers=frozenset()
    )


class Task(nn.Module):
    """The head reads the backbone through a view; the neck has no layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Network(lambda m, a, b, c, d, x: torch.relu(b(a(x))))
        self.neck = nn.MaxPool2d(2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.neck(self.backbone(x))


def test_an_output_is_followed_back_into_an_earlier_child():
    model = Task().eval()
    captured = capture(model, X)
    assert list(captured) == ["backbone", "neck"]
    found = find_edges(model, captured, X, lambda path: False)
    assert found == Edges(
        inputs=frozenset({("backbone", 0)}),
        outputs=frozenset({("neck", 0)}),
        first_layer="backbone.part.0",
        last_layers=frozenset({"backbone.part.1"}),
    )
