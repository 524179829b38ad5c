import pytest
import torch
from torch import Tensor, nn

from hf_qat.graph.capture.capture import capture


class Writes(nn.Module):
    """Writes to a part of what it computes, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if self.way == "slice":
            y[..., 1:3] += x[..., :2]
        elif self.way == "whole slice first":
            y[:, :, 2:] *= 3.0
        elif self.way == "select":
            y[:, 0] = x[:, 1]
        elif self.way == "broadcast":
            y[:, 1, :] = x[0, 0]
        elif self.way == "twice":
            y[..., :2] += x[..., 2:]
            y[..., 1:] -= x[..., 1:]
        return y + 1


WAYS = ["slice", "whole slice first", "select", "broadcast", "twice"]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_written_is_computed_and_nothing_is_written(way):
    model = Writes(way)
    inputs = [torch.randn(batch, 3, 4, generator=torch.Generator().manual_seed(batch)) for batch in (2, 5)]
    expected = [model(x) for x in inputs]
    graph = capture(model, inputs[0])[""].graph
    assert not [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]
    for x, result in zip(inputs, expected, strict=True):
        assert torch.equal(model(x), result)


def test_gradients_are_those_of_the_writing_module():
    x = torch.randn(2, 3, 4)
    gradients = []
    for captured in (False, True):
        model = Writes("twice")
        if captured:
            capture(model, x)
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
