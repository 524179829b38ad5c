from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_qat.graph.capture.capture import capture
from hf_qat.graph.model_outputs import model_outputs


X = torch.randn(3, 4)


class Two(nn.Module):
    """Returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


class Task(nn.Module):
    """A backbone of two outputs, a head on each, and Python of its own around them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head, self.auxiliary = Two(), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> object:
        first, second = self.backbone(x)
        main, other = self.head(first * 2), self.auxiliary(second * 2)
        return self.result(first, second, main, other)

    def result(self, first: Tensor, second: Tensor, main: Tensor, other: Tensor) -> object:
        raise NotImplementedError


class HeadOnly(Task):
    def result(self, first, second, main, other):
        return {"logits": nn.functional.softmax(main, -1).clone()}


class WritesInPlace(Task):
    def result(self, first, second, main, other):
        second += 1
        result = torch.zeros(main.shape[0], 3)
        result[:, :2] = main
        return result


class HiddenToo(Task):
    def result(self, first, second, main, other):
        return main, {"hidden": [second]}


class WithoutGradients(Task):
    @torch.no_grad()
    def result(self, first, second, main, other):
        return main * 2


class ThroughNumpy(Task):
    def result(self, first, second, main, other):
        return torch.from_numpy(main.numpy() * 2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (HeadOnly, {("head", 0)}),
        (WritesInPlace, {("head", 0)}),
        (HiddenToo, {("head", 0), ("backbone", 1)}),
        # Nothing is known of these: the products stand between backbone and heads, so each child may be a last one.
        (WithoutGradients, {("backbone", 0), ("backbone", 1), ("head", 0), ("auxiliary", 0)}),
        (ThroughNumpy, {("backbone", 0), ("backbone", 1), ("head", 0), ("auxiliary", 0)}),
    ],
)
def test_what_the_result_is_computed_from(make, expected):
    model = make().train()
    captured = capture(model, X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}

    assert model_outputs(model, captured, X) == expected

    assert all(module.training for module in model.modules())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_all_outputs_of_a_model_that_is_captured_as_a_whole_are_its_own():
    model = Two()
    assert model_outputs(model, capture(model, X), X) == {("", 0), ("", 1)}
