from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_qat.errors import NonFiniteError
from hf_qat.trainer.bad_steps import MOST_IN_A_ROW, BadSteps, statistics_kept_if_bad
from tests.models import resnet
from tests.training import FOLLOWED, differing, images, prepared, trainer_of, values, vit


def with_bad(count: int, bad: list[int], value: float = math.nan) -> list[dict[str, torch.Tensor]]:
    """Images of which some hold one value that is not finite."""
    rows = list(images(count))
    for position in bad:
        rows[position]["pixel_values"][0, 0, 0] = value
    return [{"pixel_values": row["pixel_values"], "labels": row["labels"]} for row in rows]


def in_order(dataset: object) -> object:
    """Trainer would shuffle it."""
    return torch.utils.data.SequentialSampler(dataset)


def train(model: torch.nn.Module, directory: Path, rows: list[dict[str, torch.Tensor]], **changes: object):
    trainer = trainer_of(
        model, directory, train_dataset=rows, max_steps=len(rows) // 2, per_device_train_batch_size=2, **changes
    )
    trainer._get_train_sampler = in_order
    trainer.calibrate(images(8))
    trainer.train()
    return trainer


class Around(TrainerCallback):
    """Keeps the state of the model before and after each step."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, *args: object, model: torch.nn.Module, **kwargs: object) -> None:
        self.before.append(values(model))

    def on_step_end(self, *args: object, model: torch.nn.Module, **kwargs: object) -> None:
        self.after.append(values(model))


ALL_LIVE = {"freeze_bn_at": 1.0, "freeze_ranges_at": 1.0}


@pytest.mark.parametrize(
    "qat",
    [ALL_LIVE, pytest.param({}, marks=pytest.mark.slow), pytest.param(FOLLOWED, marks=pytest.mark.slow)],
    ids=["all live", "default", "ranges that follow"],
)
def test_one_bad_batch_changes_nothing_and_the_run_goes_on_and_says_so(
    qat: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    around = Around()
    trainer = train(prepared(resnet, **qat), tmp_path, with_bad(8, [5]), qat=qat, callbacks=[around])
    assert trainer.state.global_step == 4
    changed = [len(differing(before, after)) for before, after in zip(around.before, around.after, strict=True)]
    assert changed[2] == 0 and changed[0] and changed[1] and changed[3]
    assert all(bool(x.isfinite().all()) for x in trainer.model.state_dict().values())
    assert "Step 3 is left out" in caplog.text and "1 of 3 steps" in caplog.text
    assert trainer.state.log_history[-2]["qat_steps_left_out"] == 1.0
    assert trainer.state.log_history[-2]["loss"] > 0


def test_many_bad_batches_in_a_row_end_the_training_with_what_to_do(tmp_path: Path):
    rows = with_bad(2 * (MOST_IN_A_ROW + 4), list(range(4, 2 * (MOST_IN_A_ROW + 4))))
    words = rf"{MOST_IN_A_ROW} steps in a row .* up to step {MOST_IN_A_ROW + 2}; .*learning rate"
    with pytest.raises(NonFiniteError, match=words):
        train(prepared(vit), tmp_path, rows)


@pytest.mark.slow
def test_bad_steps_that_are_not_in_a_row_do_not_end_it(tmp_path: Path):
    trainer = train(prepared(vit), tmp_path, with_bad(4 * MOST_IN_A_ROW, list(range(0, 4 * MOST_IN_A_ROW, 4))))
    assert trainer.state.log_history[-2]["qat_steps_left_out"] == MOST_IN_A_ROW


@pytest.mark.slow
def test_gradients_of_accumulated_batches_are_left_out_together(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = train(prepared(vit), tmp_path, with_bad(16, [1]), gradient_accumulation_steps=4)
    assert all(bool(x.isfinite().all()) for x in trainer.model.state_dict().values())
    assert caplog.text.count("is left out") >= 1


@pytest.mark.slow
def test_a_bad_gradient_is_found_without_clipping(tmp_path: Path):
    trainer = train(prepared(vit), tmp_path, with_bad(8, [3]), max_grad_norm=0.0)
    assert all(bool(x.isfinite().all()) for x in trainer.model.state_dict().values())


@pytest.mark.parametrize(("norm", "left_out"), [(1.0, False), (0.0, False), (math.inf, True), (math.nan, True)])
def test_the_norm_decides(norm: float, left_out: bool, caplog: pytest.LogCaptureFixture):
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    BadSteps().leave_out_if_bad(model, norm, 0)
    assert all((p.grad is None) is left_out for p in model.parameters())
    assert bool([r for r in caplog.records if r.levelno == logging.WARNING]) is left_out


@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_batch_norms_keep_their_statistics_through_a_bad_batch_only(loss: float):
    norm = torch.nn.BatchNorm2d(3)
    norm.batch_norm_frozen = False
    with statistics_kept_if_bad(norm) as losses:
        norm(torch.full((2, 3, 4, 4), 5.0))
        losses.append(torch.tensor(loss))
    moved = 0.0 if math.isnan(loss) else 0.5  # momentum 0.1 of a mean of 5
    assert torch.equal(norm.running_mean, torch.full((3,), moved))
    assert int(norm.num_batches_tracked) == (0 if math.isnan(loss) else 1)
