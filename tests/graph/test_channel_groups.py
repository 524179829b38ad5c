from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, prepare_qat
from hf_qat.graph.channel_groups import channel_groups


class Chain(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, between: nn.Module | None = None, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.between = nn.ReLU() if between is None else between
        self.second = nn.Conv2d(4, 8, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.norm(self.first(x))))


class Residual(Chain):
    """What the first one makes is added to what another makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.norm(self.first(x)))
        return self.second(torch.relu(y + self.inner(y)))


class Seen(Chain):
    """What lies between is an output, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.between(self.norm(self.first(x)))
        return self.second(y), y


class Summed(Chain):
    """A constant is added to what lies between."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.norm(self.first(x)) + 1.0))


def named(model: nn.Module, x: Tensor) -> list[tuple[set[str], set[str]]]:
    """Producers and consumers of each group, by name."""
    prepared = prepare_qat(model, QATConfig(), x)
    names = {module: name for name, module in prepared.named_modules()}
    return [
        ({names[each] for each in (*group.producers, *group.norms)}, {names[layer] for layer in group.consumers})
        for group in channel_groups(prepared)
    ]


IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "between",
    [nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.LeakyReLU(), nn.ZeroPad2d(1)],
)
def test_what_commutes_with_a_positive_factor_lies_between(between: nn.Module):
    assert named(Chain(between), IMAGES) == [({"first"}, {"second"})]


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_channels_are_read_by_their_own_outputs(groups: int):
    assert named(Chain(groups=groups), IMAGES) == [({"first"}, {"second"})]


@pytest.mark.parametrize(
    "between",
    [
        nn.SiLU(),
        nn.Sigmoid(),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.Softmax(1),
        nn.ConstantPad2d(1, 0.5),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_does_not_keeps_its_channels(between: nn.Module):
    assert named(Chain(between), IMAGES) == []


class OneNorm(Chain):
    """One batch norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, other = self.norm(self.first(x)), self.norm(self.other(x))
        return self.second(self.between(first)), self.third(self.between(other))


def test_a_batch_norm_of_two_layers_keeps_its_weight():
    assert named(OneNorm().eval(), IMAGES) == []


def test_all_that_is_added_has_one_factor():
    assert named(Residual(), IMAGES) == [({"first", "inner"}, {"inner", "second"})]


@pytest.mark.parametrize("model", [Seen, Summed])
def test_what_something_else_sees_keeps_its_channels(model: type[Chain]):
    assert named(model(), IMAGES) == []


def test_weights_that_are_frozen_or_shared_stay():
    frozen, shared = Chain(), Chain()
    frozen.second.weight.requires_grad_(False)
    shared.extra = nn.Conv2d(4, 8, 1)
    shared.extra.weight = shared.second.weight
    assert named(frozen, IMAGES) == named(shared, IMAGES) == []


def test_a_batch_norm_without_weights_cannot_take_a_factor():
    model = Chain()
    model.norm = nn.BatchNorm2d(4, affine=False)
    assert named(model, IMAGES) == []


def test_linear_layers_count_by_their_last_axis():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    assert named(model, torch.zeros(2, 5, 6)) == [({"0"}, {"2"})]


def test_pooling_along_the_channels_of_a_linear_layer_mixes_them():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.MaxPool1d(3, 1, 1), nn.Linear(4, 2))
    assert named(model, torch.zeros(2, 5, 6)) == []


class Normed(nn.Module):
    """Linear layers that read what a layer norm makes, with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.between = between or (lambda y: y)
        self.query, self.last = nn.Linear(4, 3), last or nn.Linear(4, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.query(y), self.last(self.between(y))


ROWS = torch.zeros(2, 9, 4)


@pytest.mark.parametrize(
    "between",
    [
        None,
        lambda y: y.reshape(-1, 3, 3, 4).roll((1, 1), (1, 2)),
        lambda y: torch.nn.functional.pad(y.view(-1, 3, 3, 4), (0, 0, 0, 1, 0, 1)),
        lambda y: y.view(-1, 3, 3, 4)[:, 1:, :2],
        lambda y: y.transpose(-2, -1).transpose(-1, -2),
        nn.Dropout(0.5),
    ],
    ids=["nothing", "roll", "pad", "slice", "transpose", "dropout"],
)
def test_a_layer_norm_takes_a_factor_for_the_linear_layers_behind_it(between: Callable[[Tensor], Tensor] | None):
    assert named(Normed(between), ROWS) == [({"norm"}, {"query", "last"})]


def test_convolutions_read_the_channels_of_a_layer_norm_where_they_are_moved():
    def to_maps(y: Tensor) -> Tensor:
        return y.view(-1, 3, 3, 4).permute(0, 3, 1, 2)

    assert named(Normed(to_maps, nn.Conv2d(4, 8, 2)), ROWS) == [({"norm"}, {"query", "last"})]


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.flip(-1),
        lambda y: y.roll(1, -1),
        lambda y: y.roll(1),
        lambda y: torch.nn.functional.pad(y, (1, -1)),
        lambda y: y.reshape(-1, 6, 6)[:, :, :4],
        lambda y: y[:, :4].transpose(1, 2),
        lambda y: y + 1.0,
        lambda y: torch.nn.functional.gelu(y),
    ],
)
def test_not_where_channels_are_moved_among_themselves(between: Callable[[Tensor], Tensor]):
    assert named(Normed(between), ROWS) == []


def test_a_layer_norm_that_something_else_uses_keeps_its_weight():
    class Residual(Normed):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y + self.last(torch.relu(self.query(y)))

    class WeightRead(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(x)) * self.norm.weight.sum()

    class Twice(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(x)), self.norm(2.0 * x)

    residual = Residual(last=nn.Linear(3, 4))
    assert named(residual, ROWS) == [({"query"}, {"last"})]
    assert named(WeightRead(), ROWS) == named(Twice(), ROWS) == []


def test_a_layer_norm_without_a_weight_or_with_a_frozen_one_takes_none():
    plain, frozen, shared = Normed(), Normed(), Normed()
    plain.norm = nn.LayerNorm(4, elementwise_affine=False)
    frozen.norm.bias.requires_grad_(False)
    shared.extra = nn.LayerNorm(4)
    shared.extra.weight = shared.norm.weight
    assert named(plain, ROWS) == named(frozen, ROWS) == named(shared, ROWS) == []
