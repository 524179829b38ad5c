from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from hf_qat.graph.capture.capture import capture
from hf_qat.graph.fingerprint import fingerprint, first_difference, operations


class Block(nn.Module):
    """Two layers, views, and functional operations of the block's own."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.activation = activation
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.conv(x)).flatten(2).transpose(1, 2)
        return torch.softmax(self.linear(y) * 2.0 + 1.0, -1).unsqueeze(1)


def lines(activation: nn.Module) -> dict[str, list[str]]:
    return operations(capture(Block(activation).eval(), torch.randn(2, 3, 4, 4), lambda path: False))


def test_operations_are_listed_by_module_in_order_and_views_are_left_out():
    assert lines(nn.ReLU()) == {"": ["conv: conv2d", "activation: relu", "linear: linear", ": mul add softmax"]}


def test_the_fingerprint_is_sha_256_of_the_lines_and_does_not_depend_on_the_order_of_children():
    found = {"b": ["x: add"], "a": [": mul"]}
    expected = hashlib.sha256(b'{"a": [": mul"], "b": ["x: add"]}').hexdigest()
    assert fingerprint(found) == fingerprint(dict(reversed(found.items()))) == expected


def test_another_activation_is_another_fingerprint_and_is_named():
    one, other = lines(nn.ReLU()), lines(nn.GELU())
    assert fingerprint(one) == fingerprint(lines(nn.ReLU())) != fingerprint(other)
    expected = "in the model, entry 1 of the operations was 'activation: relu' and is now 'activation: gelu'"
    assert first_difference(one, other) == expected


@pytest.mark.parametrize(
    ("saved", "built", "words"),
    [
        ({"a": ["x: add"]}, {"a": ["x: add"]}, None),
        ({"a": ["x: add"]}, {"a": []}, "in the child 'a', entry 0 of the operations was 'x: add' and is now missing"),
        ({"a": []}, {"a": ["x: mul"]}, "in the child 'a', entry 0 of the operations was missing and is now 'x: mul'"),
        ({"a": []}, {"a": [], "b": []}, "the child 'b' is captured now, and was not then"),
        ({"a": [], "b": []}, {"b": []}, "the child 'a' is captured no more"),
    ],
)
def test_the_first_difference_is_told_in_words(saved, built, words):
    assert first_difference(saved, built) == words
