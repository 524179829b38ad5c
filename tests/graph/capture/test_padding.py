"""Padding in front of a convolution becomes the convolution's own: the values stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from hf_qat.graph.capture.padding import merge_padding


class Convolution(nn.Module):
    """A convolution behind `before`."""

    def __init__(self, before: Callable[[Tensor], Tensor], **arguments: object) -> None:
        super().__init__()
        self.before = before
        self.conv = nn.Conv2d(3, 4, 3, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8)."""
        return self.conv(self.before(x))


def merged(before: Callable[[Tensor], Tensor], **arguments: object) -> tuple[list[str], tuple[int, ...]]:
    """Operations after the pass, and the padding of the convolution; the output must not have changed.

    All numbers are small integers, so that float32 sums are exact in any order.
    """
    x = torch.randint(-8, 8, (2, 3, 8, 8)).float()
    model = Convolution(before, **arguments)
    for parameter in model.parameters():
        parameter.data = torch.randint(-8, 8, parameter.shape).float()
    module: fx.GraphModule = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    merge_padding(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    assert torch.equal(module(x), model(x))
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    convolution = next(node for node in nodes if node.target is torch.ops.aten.conv2d.default)
    padding = convolution.args[4] if len(convolution.args) > 4 else [0, 0]
    return [node.target.overloadpacket.__name__ for node in nodes], tuple(padding)


@pytest.mark.parametrize(
    ("amounts", "arguments", "expected"),
    [
        ((1, 1, 1, 1), {}, (1, 1)),
        ((2, 2, 1, 1), {}, (1, 2)),  # functional.pad begins with the last axis
        ((2, 2), {}, (0, 2)),
        ((1, 1, 1, 1), {"padding": 2}, (3, 3)),
        ((1, 1, 1, 1), {"padding": (0, 1), "stride": 2, "dilation": 2, "bias": False}, (1, 2)),
    ],
)
def test_symmetric_zeros_become_padding(amounts, arguments, expected):
    assert merged(lambda x: functional.pad(x, amounts), **arguments) == (["conv2d"], expected)


@pytest.mark.parametrize(
    "before",
    [
        lambda x: functional.pad(x, (0, 1, 0, 1)),
        lambda x: functional.pad(x, (1, 1, 1, 1), value=0.5),
        lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: functional.pad(x, (-1, -1, 1, 1)),
    ],
    ids=["one-sided", "of another value", "reflected", "cropped"],
)
def test_any_other_padding_stays(before):
    operations, padding = merged(before)
    assert operations == ["pad", "conv2d"]
    assert padding == (0, 0)


def test_a_pad_that_others_read_too_stays_for_them():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            padded = functional.pad(x, (1, 1, 1, 1))
            return self.conv(padded), padded

    x, model = torch.randn(1, 3, 8, 8), Both()
    module = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    merge_padding(module.graph)
    module.recompile()
    for ours, theirs in zip(module(x), model(x), strict=True):
        assert torch.equal(ours, theirs)
