from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_qat.quantization.class_swap import original_class, rebased, swap_class


class Doubled(nn.Module):
    """Computes twice what the module that it is mixed into computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def added(self) -> str:
        return "ours"


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def test_the_module_stays_the_same_object_with_the_same_parameters_under_the_same_name():
    module = nn.Linear(3, 2)
    weight, keys, before = module.weight, list(module.state_dict()), vars(module).keys()
    swapped = swap_class(module, Doubled)
    assert swapped is module and module.weight is weight
    assert list(module.state_dict()) == keys and vars(module).keys() == before
    assert isinstance(module, nn.Linear) and isinstance(module, Doubled) and type(module).__name__ == "Linear"
    assert (module.in_features, module.added()) == (3, "ours")


def test_the_mixed_in_forward_runs_before_the_original_one():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = nn.functional.linear(x, module.weight, module.bias)
    assert torch.equal(swap_class(module, Doubled)(x), 2 * expected)


def test_a_forward_that_is_given_replaces_both():
    module = swap_class(nn.Linear(3, 2), Doubled, lambda self, x: x + 1)
    assert torch.equal(module(torch.zeros(1)), torch.ones(1))


def test_classes_are_made_once_so_that_equal_modules_have_one_type():
    one, other = swap_class(nn.Linear(3, 2), Doubled), swap_class(nn.Linear(1, 1), Doubled)
    assert type(one) is type(other) and type(copy.deepcopy(one)) is type(one)
    assert type(swap_class(nn.Conv2d(1, 1, 1), Doubled)) is not type(one)


def test_the_original_class_is_found_again_and_can_be_restored():
    module = swap_class(nn.Linear(3, 2), Doubled)
    assert original_class(type(module)) is nn.Linear
    module.__class__ = original_class(type(module))
    assert type(module) is nn.Linear
    assert torch.equal(module(torch.zeros(1, 3))[0], module.bias)


def test_mixed_in_parts_can_be_put_on_top_of_another_class_in_their_order():
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 10

    module = swap_class(swap_class(nn.Linear(2, 2), Doubled), Negated)
    module.__class__ = rebased(type(module), Mine)
    plain = nn.functional.linear(torch.ones(1, 2), module.weight, module.bias)
    assert torch.equal(module(torch.ones(1, 2)), -(2 * (plain + 10)))
    assert isinstance(module, Mine) and isinstance(module, Doubled) and isinstance(module, Negated)
    assert rebased(nn.Linear, Mine) is Mine
