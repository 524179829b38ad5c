import torch
from torch import Tensor, nn

from hf_qat import QATConfig, prepare_qat
from hf_qat.model.in_float import FloatOperation, float_operations
from hf_qat.model.python_code import REASON


class Branches(nn.Module):
    """Control flow that no graph can hold, around a weight that is no layer's own and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.inner(x), self.weight)
        return x @ x.transpose(-1, -2) if x.sum() > 0 else x @ -x.transpose(-1, -2)


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), Branches()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.body(x))


def test_layers_and_products_outside_all_graphs_are_named():
    model = prepare_qat(Task(), QATConfig(), torch.randn(2, 3, 4))
    assert float_operations(model) == [
        FloatOperation("head", "linear", REASON),
        FloatOperation("head", "matmul", REASON),
    ]


def test_what_the_recipe_excludes_is_not_looked_into():
    model = prepare_qat(Task(), QATConfig(exclude="head"), torch.randn(2, 3, 4))
    assert float_operations(model) == []


def test_a_model_whose_parts_are_all_captured_is_not_run_again():
    class Counts(Task):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.calls: list[int] = []

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            self.calls.append(len(x))
            return super().forward(x)

    model = Counts()
    prepare_qat(model, QATConfig(), torch.randn(2, 4))
    assert 1 not in model.calls
