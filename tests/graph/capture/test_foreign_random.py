import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat import fake_quant_disabled, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.graph.capture.foreign_random import refusing_foreign_random_numbers
from hf_qat.graph.capture.inputs import BATCH_SIZES
from hf_qat.graph.captured import captured_modules


DRAWS = {"Python": random.random, "numpy": np.random.rand}


class LayerDrop(nn.Module):
    """Leaves out its layer in every second step of training (Fan 2019)."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.first, self.second, self.draw = nn.Linear(4, 4), nn.Linear(4, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.training and self.draw() < 0.5 else self.second(x)


class DropsAtASize(nn.Module):
    """Leaves out its layer at one size of the batch, as chance does, and decides so by a random number."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second, self.size = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), size

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if self.training and torch.rand(()) < (len(x) == self.size) else self.second(x)


@pytest.mark.parametrize("kind", DRAWS)
def test_layers_are_dropped_at_random_in_every_step_and_the_model_says_that_it_is_python(kind, caplog):
    torch.manual_seed(0)
    float_model, x = LayerDrop(DRAWS[kind]), torch.randn(3, 4)
    expected = [float_model.second(float_model.first(x)), float_model.first(x)]
    model = prepare_qat(float_model, example_inputs=x).train()
    assert f"draws random numbers of {kind}" in caplog.text
    assert [*captured_modules(model)] == ["first", "second"]
    random.seed(0), np.random.seed(0)
    with fake_quant_disabled(model):
        steps = [model(x) for _ in range(20)]
    which = [[torch.allclose(step, y, atol=1e-6) for y in expected] for step in steps]
    assert {tuple(w) for w in which} == {(True, False), (False, True)}


@pytest.mark.parametrize("dropped", BATCH_SIZES, ids=["in the first run", "in the second run"])
def test_a_layer_that_a_rehearsal_has_dropped_takes_any_batch_in_training(dropped):
    float_model, x = DropsAtASize(dropped), torch.randn(5, 4, 6)
    expected = float_model.second(float_model.first(x))
    model = prepare_qat(float_model, example_inputs=torch.randn(2, 4, 6)).train()
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected)


def test_the_state_of_the_numbers_is_afterwards_as_before():
    random.seed(3), np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3), np.random.seed(3)
    with pytest.raises(CaptureError, match="draws random numbers of Python"):
        with refusing_foreign_random_numbers("body"):
            random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == expected
    random.seed(3), np.random.seed(3)
    with pytest.raises(ZeroDivisionError), refusing_foreign_random_numbers("body"):
        random.random(), np.random.rand(), 1 / 0
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("kind", DRAWS)
def test_training_draws_what_it_would_have_drawn_from_the_float_model(kind):
    draw, model = DRAWS[kind], LayerDrop(DRAWS[kind])
    random.seed(3), np.random.seed(3)
    expected = draw()
    random.seed(3), np.random.seed(3)
    prepare_qat(model, example_inputs=torch.randn(3, 4))
    assert draw() == expected


def test_the_gpus_of_the_machine_are_not_asked_for_a_model_on_the_cpu(monkeypatch, recwarn):
    """torch warns of several, once, and makes a context on each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    prepare_qat(LayerDrop(random.random), example_inputs=torch.randn(3, 4))
    assert not [str(warning.message) for warning in recwarn if "available devices" in str(warning.message)]
