"""Ways to train that users of Trainer have; with quantizers off, the loss is that of a plain Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_qat.model.switches import fake_quant_disabled
from hf_qat.trainer.trainer import QATTrainer
from tests.models import LABELS, hand_written, resnet
from tests.training import arguments, images, prepared, trainer_of, values, vit


class Loss(nn.Module):
    """A model of the user's own, whose labels have a name of their own and come in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = hand_written()

    def forward(self, pixel_values: Tensor, targets: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Logits, and with `targets` their weighted cross-entropy."""
        logits = self.body(pixel_values)
        if targets is None:
            return {"logits": logits}
        each = nn.functional.cross_entropy(logits, targets["classes"], reduction="none")
        return {"loss": (each * targets["weights"]).mean(), "logits": logits}


def collate_targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Nested labels."""
    labels = torch.stack([row["labels"] for row in rows])
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "targets": {"classes": labels, "weights": 1.0 + labels.float()},
    }


def focal(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Lin et al. 2017, eq. 4, with gamma 2."""
    log_p = nn.functional.log_softmax(outputs["logits"], -1).gather(1, labels[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


MODES = {
    "label smoothing": (vit, {"label_smoothing_factor": 0.2}),
    "a loss function": (resnet, {"compute_loss_func": focal}),
    "nested labels of another name": (
        Loss,
        {"label_names": ["targets"], "data_collator": collate_targets, "remove_unused_columns": False},
    ),
}


def loss_of(trainer: Trainer) -> Tensor:
    """Of the first batch of the evaluation set."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model.eval(), batch)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_trainer_and_training_goes_on_from_it(tmp_path: Path, mode: str):
    make, changes = MODES[mode]
    model = make()
    trainer = trainer_of(copy.deepcopy(model), tmp_path, **changes)
    mine = {name: changes[name] for name in ("compute_loss_func", "data_collator") if name in changes}
    rest = {name: value for name, value in changes.items() if name not in mine}
    plain = Trainer(
        model, arguments(tmp_path, **rest), train_dataset=images(16), eval_dataset=images(10, seed=1), **mine
    )
    with fake_quant_disabled(trainer.model):
        torch.testing.assert_close(loss_of(trainer), loss_of(plain), rtol=1e-4, atol=1e-6)
    before = values(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(map(lambda loss: 0 < loss < 100, losses))
    weights = [key for key in before if key.endswith("weight") and "quantizer" not in key]
    after = values(trainer.model)
    assert weights and all(not torch.equal(before[key], after[key]) for key in weights)


def test_batches_of_different_sizes_train_in_one_epoch(tmp_path: Path):
    trainer: QATTrainer = trainer_of(
        prepared(vit), tmp_path, train_dataset=images(7), max_steps=-1, num_train_epochs=2
    )
    seen: list[int] = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])) if module.training else None,
        with_kwargs=True,
    )
    trainer.train()
    hook.remove()
    assert seen == [4, 3, 4, 3]


def test_labels_of_a_number_that_the_head_does_not_have_fail_as_in_trainer(tmp_path: Path):
    rows = images(8)
    wrong = rows.map(lambda row: {"labels": LABELS + 3})
    with pytest.raises(IndexError, match="Target"):
        trainer_of(prepared(resnet), tmp_path, train_dataset=wrong).train()
