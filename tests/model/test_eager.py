"""What runs as it is written while it is looked at, and compiled before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Thread

import pytest
import torch
from torch import Tensor, fx, nn

from hf_qat.model.eager import in_eager_mode, uncompiled


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting(runs: list[int]) -> Callable[..., object]:
    """A backend whose graphs count how often they run."""

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        def run(*args: Tensor) -> object:
            runs[0] += 1
            return graph(*args)

        return run

    return backend


def test_inside_no_compiled_code_runs_and_afterwards_it_does_again():
    runs = [0]
    model, x = torch.compile(nn.Linear(2, 2), backend=counting(runs)), torch.randn(1, 2)
    expected = model(x)
    assert runs == [1]
    with in_eager_mode(), in_eager_mode():
        assert torch.equal(model(x), expected)
    assert runs == [1]
    model(x)
    assert runs == [2]


def test_of_threads_that_end_in_the_order_in_which_they_began_the_last_one_puts_it_back():
    runs = [0]
    model, x = torch.compile(nn.Linear(2, 2), backend=counting(runs)), torch.randn(1, 2)
    model(x)
    first, second = ExitStack(), ExitStack()
    for step in (
        lambda: first.enter_context(in_eager_mode()),
        lambda: second.enter_context(in_eager_mode()),
        first.close,
    ):
        thread = Thread(target=step)
        thread.start()
        thread.join()
    model(x)
    assert runs == [1]
    second.close()
    model(x)
    assert runs == [2]


def test_what_is_inside_a_compiled_model_is_found_and_another_one_is_itself():
    model = nn.Linear(2, 2)
    assert uncompiled(torch.compile(model, backend="eager")) is model
    assert uncompiled(model) is model
