"""What processes have in common, in two real ones and in one alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_qat import freeze_ranges
from hf_qat.model.prepare import prepare_qat
from hf_qat.trainer import ddp
from hf_qat.trainer.ddp import (
    average_gradients,
    copy_from_first_rank,
    leave_out_of_ddp,
    scales_in_training,
    without_gradient,
)
from tests.models import hand_written
from tests.ranks import on_two_ranks
from tests.training import recipe


def one_of_two(rank: int) -> dict[str, object]:
    """Gradients: of the first parameter in both, of the second in one process, of the third in none."""
    norm = nn.BatchNorm1d(2)
    nn.init.constant_(norm.weight, 3.0 + rank)
    norm.running_mean.fill_(5.0 + rank)
    copy_from_first_rank(norm, torch.device("cpu"))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), ())]
    parameters[0].grad = torch.full((2, 2), 1.0 + rank)
    if rank == 1:
        parameters[1].grad = torch.tensor([2.0, 4.0, 6.0])
    average_gradients(parameters)
    return {"weight": norm.weight.detach(), "mean": norm.running_mean, "gradients": [p.grad for p in parameters]}


@pytest.mark.slow
def test_two_processes_get_the_weights_of_the_first_and_the_mean_of_their_gradients(tmp_path: Path):
    for found in on_two_ranks(one_of_two, tmp_path):
        assert found["weight"].tolist() == [3.0, 3.0] and found["mean"].tolist() == [5.0, 5.0]
        both, one, none = found["gradients"]
        assert both.tolist() == [[1.5, 1.5], [1.5, 1.5]]
        assert one.tolist() == [1.0, 2.0, 3.0] and none is None


def test_gradients_that_all_processes_have_are_averaged_without_reading_a_tensor(monkeypatch: pytest.MonkeyPatch):
    """On a GPU, to read one is to wait for all that was launched before."""
    monkeypatch.setattr(ddp, "is_active", lambda: True)
    monkeypatch.setattr(ddp, "mean_over_ranks", lambda message: message / 2)
    for read in ("tolist", "item", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, read, lambda *_: pytest.fail("a tensor was read"))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2,), ())]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    average_gradients(parameters)
    monkeypatch.undo()
    assert [parameter.grad.tolist() for parameter in parameters] == [[1.5, 1.5], 1.5]


def test_frozen_scales_are_left_out_of_the_message():
    model = prepare_qat(hand_written(), recipe(), torch.randn(2, 3, 16, 16))
    learned = scales_in_training(model)
    assert learned and all(isinstance(scale, nn.Parameter) for scale in learned)
    learned[0].requires_grad_(False)
    assert len(scales_in_training(model)) == len(learned) - 1
    assert scales_in_training(freeze_ranges(model)) == []


def test_one_process_alone_keeps_its_weights_and_gradients():
    linear = nn.Linear(2, 2)
    before = linear.weight.detach().clone()
    linear.bias.grad = torch.tensor([1.0, 2.0])
    copy_from_first_rank(linear, torch.device("cpu"))
    average_gradients([linear.weight, linear.bias])
    assert torch.equal(linear.weight, before)
    assert linear.weight.grad is None and linear.bias.grad.tolist() == [1.0, 2.0]


def test_ddp_leaves_alone_what_preparing_has_added():
    model = prepare_qat(hand_written(), recipe(), torch.randn(2, 3, 16, 16))
    leave_out_of_ddp(model)
    named = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    floating = {name for name, _ in [*hand_written().named_parameters(), *hand_written().named_buffers()]}
    assert named - set(model._ddp_params_and_buffers_to_ignore) == floating


def test_parameters_that_a_loss_does_not_depend_on_are_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 2)})
    assert without_gradient(model, model["used"](torch.ones(1, 2)).sum()) == ["spare.weight", "spare.bias"]
    model["spare"].bias.requires_grad_(False)
    assert without_gradient(model, model["used"](torch.ones(1, 2)).sum()) == ["spare.weight"]


def test_scales_are_not_named():
    model = prepare_qat(hand_written(), recipe(), torch.randn(2, 3, 16, 16))
    loss = sum(parameter.sum() for name, parameter in model.named_parameters() if "quantizer" not in name)
    assert without_gradient(model, loss) == []
