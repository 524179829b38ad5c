from pathlib import Path

import pytest
from transformers import Trainer

from hf_qat.trainer.training_facts import schedule_of
from tests.models import resnet
from tests.training import arguments, images, recipe


def test_an_untrained_model_has_no_schedule(tmp_path: Path):
    assert schedule_of(Trainer(resnet(), arguments(tmp_path)), recipe(), distilled=False) == {}


def test_it_says_what_was_done_and_not_what_was_asked_for(tmp_path: Path):
    """4 images of 2 accumulated batches a step; 16 images an epoch; 3 of 6 steps, as if it had been stopped."""
    args = arguments(
        tmp_path,
        max_steps=6,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        seed=7,
        learning_rate=2e-4,
    )
    trainer = Trainer(resnet(), args, train_dataset=images(16))
    trainer.train()
    trainer.state.global_step, trainer.state.epoch = 3, 1.5
    assert schedule_of(trainer, recipe(scale_lr_multiplier=5.0, freeze_bn_at=0.0), distilled=False) == {
        "Steps": "3 of 6",
        "Epochs": "1.5",
        "Images a step": 8,
        "Learning rate": "0.0002, cosine; learned scales × 5",
        "Optimizer": "adamw_torch",
        "Weight decay": "0.05",
        "Seed": 7,
        "Batch norm frozen": "from the first step",
        "Ranges frozen": "after 75% of the steps",
    }


@pytest.mark.parametrize(
    ("changes", "expected"), [pytest.param({}, None, marks=[pytest.mark.slow]), ({"bf16": True}, "bfloat16")]
)
def test_mixed_precision_and_a_teacher_are_named_where_they_were(tmp_path: Path, changes: dict, expected: str | None):
    trainer = Trainer(resnet(), arguments(tmp_path, max_steps=1, **changes), train_dataset=images(8))
    trainer.train()
    config = recipe(distillation_weight=0.25, distillation_temperature=4.0)
    schedule = schedule_of(trainer, config, distilled=expected is None)
    assert schedule.get("Mixed precision") == expected
    assert schedule.get("Distillation") == ("weight 0.25, temperature 4" if expected is None else None)
