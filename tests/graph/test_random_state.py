import random

import numpy as np
import pytest
import torch

from hf_qat.graph.random_state import random_state_kept


def draw() -> tuple[float, float, float]:
    """A number of each generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def test_what_is_drawn_inside_changes_nothing_afterwards():
    seed()
    expected = [draw() for _ in range(2)]
    seed()
    first = draw()
    with random_state_kept(torch.device("cpu")):
        inside = draw()
        random.seed(99)
        torch.manual_seed(99)
    assert [first, draw()] == expected
    assert inside == expected[1]  # the numbers inside are those that would have come next


def test_an_error_inside_puts_it_back_too():
    seed()
    expected = draw()
    seed()
    with pytest.raises(ZeroDivisionError), random_state_kept(torch.device("cpu")):
        draw()
        raise ZeroDivisionError
    assert draw() == expected
