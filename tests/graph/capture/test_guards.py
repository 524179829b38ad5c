import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_qat import fake_quant_disabled, prepare_qat
from hf_qat.graph.capture.guards import doubtful_sizes
from hf_qat.graph.captured import captured_modules


class Branch(nn.Module):
    """Does one thing or another, as its condition says of the input."""

    def __init__(self, condition) -> None:
        super().__init__()
        self.conv, self.condition = nn.Conv2d(4, 4, 3), condition

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * 2 if self.condition(x) else x


#: What forward asks, and the smallest batch size from 2 at which the answer changes.
CONDITIONS = {
    "more than ten": (lambda x: x.shape[0] > 10, 11),
    "a multiple of four": (lambda x: x.shape[0] % 4 == 0, 4),
    "just seven": (lambda x: x.shape[0] == 7, 7),
    "many values": (lambda x: x.numel() > 4000, 28),
    "a hundred": (lambda x: len(x) >= 100, 128),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_branch_on_the_batch_size_is_that_of_the_float_model_at_any_size(name, training):
    condition, size = CONDITIONS[name]
    float_model = Branch(condition).train(training)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=torch.randn(3, 4, 8, 8))
    assert [*captured_modules(model)] == ["conv"]
    for batch in (1, 2, size, size + 1):
        x = torch.randn(batch, 4, 8, 8)
        with fake_quant_disabled(model):
            torch.testing.assert_close(model(x), float_model(x))


class Reshaped(nn.Module):
    """Its reshaping makes the exporter ask whether sizes divide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.reshape(-1, 2 * x.shape[0], 3).reshape(x.shape)


def test_a_check_that_changes_nothing_does_not_stand_in_the_way():
    model = prepare_qat(Reshaped(), example_inputs=torch.randn(3, 4, 8, 8))
    assert [*captured_modules(model)] == [""]


def test_the_smallest_sizes_are_named_at_which_a_guard_fails_and_a_few_at_most():
    at_two, at_three = [torch.empty(2, 5), torch.empty(2)], [torch.empty(3, 5), torch.empty(2)]
    guards = [
        "L['tensors'][0].size()[0] <= 10",
        "(L['tensors'][0].size()[0] % 6) != 0",
        "L['tensors'][1].size()[0] == 2",
        "L['tensors'][0].stride()[0] == 5",
    ]
    assert doubtful_sizes(guards, at_two, at_three) == (6, 11)
    assert doubtful_sizes([f"L['tensors'][0].size()[0] != {n}" for n in range(20, 2, -1)], at_two, at_three) == (
        3,
        4,
        5,
        6,
    )
    assert doubtful_sizes([], at_two, at_three) == ()


#: What is no question about sizes: it is left aside, and none of it is run.
HOSTILE = (
    "__import__('pathlib').Path({path!r}).touch()",
    "(lambda: open({path!r}, 'w'))() == 1",
    "[open({path!r}, 'w') for _ in (1,)] == 1",
    "L.__class__.__init__.__globals__['__builtins__']['open']({path!r}, 'w')",
    "math.floor.__self__.__loader__.load_module('builtins').open({path!r}, 'w')",
    "L['tensors'][0].size()[0] < 9 ** 9 ** 9 ** 9",
    "1 if L['tensors'][open({path!r}, 'w')].size()[0] else 0",
    "max(open({path!r}, 'w'))",
    "(" * 3000,
    "\0",
    "",
)


@pytest.mark.parametrize("guard", HOSTILE, ids=range(len(HOSTILE)))
def test_a_guard_is_never_run_as_python(guard, tmp_path):
    path = tmp_path / "made"
    assert doubtful_sizes([guard.replace("{path!r}", repr(str(path)))], [torch.empty(2)], [torch.empty(3)]) == ()
    assert not path.exists()


@given(
    st.recursive(
        st.sampled_from(["L['tensors'][0].size()[0]", "L['tensors'][1].size()[1]", "1", "2", "7", "12"]),
        lambda inner: (
            st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map("({0[0]} {0[1]} {0[2]})".format)
            | st.tuples(inner, inner).map("max({0[0]}, {0[1]})".format)
            | st.tuples(inner, inner, inner).map("({0[0]} if {0[1]} > 4 else math.floor({0[2]}))".format)
        ),
        max_leaves=6,
    ),
    st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    st.integers(-5, 60),
)
def test_a_guard_on_sizes_has_the_value_that_python_gives_it(left, comparison, right):
    class Shaped:
        def __init__(self, *sizes: int) -> None:
            self.size = lambda: sizes

    def holds(size: int) -> bool:
        inputs = {"tensors": [Shaped(size, 5), Shaped(3, 2 * size)]}
        try:
            return eval(guard, {"L": inputs, "math": math})
        except ZeroDivisionError:
            return True

    guard = f"{left} {comparison} {right} or {left} < -3"
    failing = [size for size in (*range(2, 65), 128, 256, 512, 1024) if not holds(size)]
    found = doubtful_sizes([guard], [torch.empty(2, 5), torch.empty(3, 4)], [torch.empty(3, 5), torch.empty(3, 6)])
    assert found == tuple(failing[:1])
