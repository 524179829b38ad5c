import pytest
import torch
from torch import Tensor, nn

from hf_qat.graph.capture.clean import Constants
from hf_qat.graph.capture.dry_run import whole_call
from hf_qat.graph.capture.exporting import export_call
from hf_qat.graph.capture.proof import first_difference


class Reversed(torch.autograd.Function):
    """The identity, with a gradient of the other sign."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Reversing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(Reversed.apply(x))


class Branching(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[0] > 1 else -self.linear(x)


def difference(module: nn.Module, rows: int) -> str | None:
    call, constants = whole_call(module, torch.randn(2, 4)), Constants(module)
    graph = export_call(call, False, constants)
    return first_difference(module, graph, constants.values, [torch.randn(rows, 4)], gradients=True)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_graph_that_computes_what_the_module_does_differs_in_nothing(rows):
    assert difference(Layer(), rows) is None


def test_a_backward_pass_of_its_own_is_found():
    assert "gradients" in str(difference(Reversing(), 2))


def test_a_branch_on_the_size_of_the_batch_is_found_at_that_size():
    assert difference(Branching(), 3) is None
    assert "outputs" in str(difference(Branching(), 1))


def test_another_value_in_the_graph_is_found_and_the_module_stays_as_it_was():
    module = Layer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    call, constants = whole_call(module, torch.randn(2, 4)), Constants(module)
    graph = export_call(call, True, constants)
    linear = next(node for node in graph.graph.nodes if "linear" in str(node.target))
    with graph.graph.inserting_after(linear):
        shifted = graph.graph.call_function(torch.add, (linear, 0.01))
    linear.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)
    graph.recompile()
    state = torch.get_rng_state()
    assert "outputs" in str(first_difference(module, graph, constants.values, [torch.randn(2, 4)], gradients=False))
    assert module.training and all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    torch.set_rng_state(state)
