from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_qat.export.naming import name_after_modules


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.act(x + self.act(x * 2))


def test_nodes_and_values_are_named_after_their_module_and_numbered_where_it_runs_twice(stock_export, run_onnx):
    x = torch.randn(1, 3, 4, 4)
    model = stock_export(TwoBranches(), x)
    result = model.graph.output[0].name
    before = run_onnx(model, x.numpy())[0]

    name_after_modules(model)

    names = ["stem.0/Conv", "stem.1/Relu", "Mul", "act/Relu", "Add", "act/Relu_1"]
    assert [node.name for node in model.graph.node] == names
    assert [node.output[0] for node in model.graph.node] == [*names[:-1], result]
    assert "stem.0.weight" in {tensor.name for tensor in model.graph.initializer}
    assert (run_onnx(model, x.numpy())[0] == before).all()


def test_no_new_name_collides_with_an_input_or_an_initializer(parse):
    model = parse("g (float[2] Relu) => (float y) <float[2] Add = {1, 2}> { z = Relu (Relu) y = Add (z, Add) }")
    name_after_modules(model)
    assert [list(node.output) for node in model.graph.node] == [["Relu_1"], ["y"]]
    assert list(model.graph.node[1].input) == ["Relu_1", "Add"]


def test_values_read_inside_a_branch_are_renamed_there_too(parse):
    model = parse("""g (float[2] x, bool c) => (float[2] y) {
        kept = Abs (x)
        y = If (c) <
            then_branch = yes () => (float[2] t) { t = Neg (kept) },
            else_branch = no () => (float[2] kept) { }
        >
    }""")
    name_after_modules(model)
    branches = {attribute.name: attribute.g for attribute in model.graph.node[1].attribute}
    assert branches["then_branch"].node[0].input[0] == "Abs"
    assert branches["else_branch"].output[0].name == "Abs"
