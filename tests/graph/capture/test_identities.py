"""What may be dropped from a graph, and what only looks so: every graph is run before and after."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from hf_qat.graph.capture.identities import drop_identities


SIZE = (2, 3, 4)


def exported(forward: Callable[..., Tensor], *inputs: Tensor, constants: dict[str, Tensor] | None = None) -> fx.Graph:
    """The graph of `forward(module, *inputs)`, with `constants` as buffers."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in (constants or {}).items():
                self.register_buffer(name, value)

        def forward(self, *args: Tensor) -> Tensor:
            return forward(self, *args)

    return torch.export.export(Module(), inputs, strict=False).module(check_guards=False)


def operations(module: fx.GraphModule) -> list[str]:
    """Names of the ATen operations."""
    return [node.target.overloadpacket.__name__ for node in module.graph.nodes if node.op == "call_function"]


def dropped(module: fx.GraphModule) -> list[str]:
    """Drop what can go; the rest must still run."""

    def constant(node: fx.Node) -> Tensor | None:
        return getattr(module, str(node.target))

    drop_identities(module.graph, constant)
    module.graph.eliminate_dead_code()
    module.recompile()
    return operations(module)


X = torch.arange(24, dtype=torch.float32).view(SIZE)


@pytest.mark.parametrize(
    ("forward", "constants"),
    [
        (lambda self, x: x + self.zeros, {"zeros": torch.zeros(4)}),
        (lambda self, x: self.zeros + x, {"zeros": torch.zeros(SIZE)}),
        (lambda self, x: x + torch.where(self.keep, 0.0, -1e4), {"keep": torch.ones(3, 4, dtype=torch.bool)}),
        (lambda self, x: torch.where(self.keep[None], x, -1e4), {"keep": torch.ones(3, 4, dtype=torch.bool)}),
        (lambda self, x: x.masked_fill(self.drop.expand(3, 4), -1e4), {"drop": torch.zeros(1, 4, dtype=torch.bool)}),
        (lambda self, x: nn.functional.pad(x, (0, 0, 0, 0)), {}),
    ],
    ids=["zeros on the right", "zeros on the left", "a mask made of zeros", "where", "masked fill", "pad"],
)
def test_what_changes_nothing_goes_and_the_value_stays(forward, constants):
    module = exported(forward, X, constants=constants)
    assert operations(module)
    assert dropped(module) == []
    assert torch.equal(module(X), X)


@pytest.mark.parametrize(
    ("forward", "constants"),
    [
        (lambda self, x: x + self.some, {"some": torch.tensor([0.0, 0.0, 1.0, 0.0])}),
        (lambda self, x: x + self.wider, {"wider": torch.zeros(5, 2, 3, 4)}),
        (lambda self, x: x + self.wide_type, {"wide_type": torch.zeros(4, dtype=torch.float64)}),
        (lambda self, x: x.masked_fill(self.drop, -1.0), {"drop": torch.ones(4, dtype=torch.bool)}),
        (lambda self, x: torch.where(self.keep, x, 7.0), {"keep": torch.tensor([True, False, True, True])}),
        (lambda self, x: nn.functional.pad(x, (0, 1)), {}),
        (lambda self, x: (x + self.zeros).add_(1.0), {"zeros": torch.zeros(4)}),
    ],
    ids=["not all zeros", "broadcast", "promotion", "full mask", "mixed mask", "padding", "written into"],
)
def test_what_changes_something_stays(forward, constants):
    module = exported(forward, X, constants=constants)
    before = operations(module)
    expected = forward(type("Constants", (), constants), X.clone())
    assert set(before) <= {*dropped(module)}
    assert torch.equal(module(X.clone()), expected)
    assert torch.equal(X, torch.arange(24, dtype=torch.float32).view(SIZE))


def test_a_buffer_that_may_change_is_no_constant():
    module = exported(lambda self, x: x + self.zeros, X, constants={"zeros": torch.zeros(4)})
    drop_identities(module.graph, lambda node: None)
    module.graph.eliminate_dead_code()
    assert operations(module) == ["add"]
