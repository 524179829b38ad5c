import torch
from torch import Tensor, nn

from hf_qat.graph.capture.capture import capture
from hf_qat.graph.nodes import operation_name
from hf_qat.graph.passes.twins import find_twins


class Noisy(nn.Module):
    """In training, noise is added before the residual is, so that the second addition is evaluation's first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.training:
            y = y + torch.randn_like(y)
        return self.second(torch.relu(y)) + x


def test_operations_that_only_training_has_find_no_twin_and_shift_no_other():
    module = capture(Noisy(), torch.randn(2, 4))[""]
    evaluation, training = (way.graph for way in module.graphs)
    twins = find_twins(evaluation, training)
    names = {
        operation_name(ours): operation_name(theirs) for ours, theirs in twins.items() if ours.op == "call_function"
    }
    assert names == {"linear": "linear", "relu": "relu", "add": "add"}
    residual = next(node for node in evaluation.nodes if operation_name(node) == "add")
    assert any(argument.op == "placeholder" for argument in twins[residual].all_input_nodes)
    assert sum(operation_name(node) == "add" for node in training.nodes) == 2


def test_inputs_are_matched_by_the_names_of_their_arguments():
    module = capture(Noisy(), torch.randn(2, 4))[""]
    evaluation, training = module.graphs
    twins = find_twins(evaluation.graph, training.graph)
    assert [twins[node] for node in evaluation.inputs()] == training.inputs()
