"""A user's script, run by two processes and by one: trainings of 20 steps, and what they leave behind.

torchrun --nproc_per_node 2 train.py DIRECTORY BATCH_SIZE
"""

import os
import signal
import sys
from pathlib import Path

import torch

from hf_qat.errors import CalibrationError
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet
from tests.training import FOLLOWED, arguments, images, recipe


RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

#: Recipes whose trainings must not depend on the number of processes.
RECIPES = {
    "learned": {},
    "followed": FOLLOWED,
    "still": {**FOLLOWED, "bias_correction": False},
    "synchronized": {"freeze_bn_at": 0.75, "sync_batch_norm": True},
}


class Logged(QATTrainer):
    """Says who saves."""

    def _save(self, *args: object, **kwargs: object) -> None:
        if self.args.should_save:
            (Path(self.args.output_dir) / f"saved_by_{RANK}").touch()
        super()._save(*args, **kwargs)


class OwnLoss(QATTrainer):
    """Takes its loss from the logits, as scripts do whose model gives none."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


class Killed(QATTrainer):
    """The second process dies in the sixth step, while the first one waits for its gradients."""

    def compute_loss(self, *args: object, **kwargs: object) -> object:
        if RANK == 1 and self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_loss(*args, **kwargs)


def trainer_of(kind: type[QATTrainer], directory: Path, batch: int, count: int = 80, **changes: object) -> QATTrainer:
    """On `count` images; the model differs between processes, as one with a fresh head does."""
    torch.manual_seed(RANK)
    model = resnet()
    if RANK > 0:
        torch.nn.init.normal_(model.classifier[1].weight)
    qat = {"freeze_bn_at": 0.0, "freeze_ranges_at": 0.75, **changes.pop("qat", {})}
    # Plain gradient descent: Adam makes as much of a gradient of 1e-9 as of one of 1, and that one is rounding.
    args = {"per_device_train_batch_size": batch, "max_steps": 20, "optim": "sgd", **changes}
    data = {"train_dataset": images(count), "eval_dataset": images(10, seed=1)}
    return kind(model, arguments(directory, **args), qat_config=recipe(**qat), **data)


def result(trainer: QATTrainer) -> dict[str, object]:
    """What a training came to."""
    handler = trainer.accelerator.ddp_handler
    return {
        "state": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wrapped": type(trainer.model_wrapped).__name__,
        "find_unused": handler is not None and handler.find_unused_parameters,
    }


def trained(directory: Path, name: str, batch: int) -> dict[str, object]:
    """Calibrated, evaluated and trained by the recipe `name`."""
    rate = 0.0 if name == "still" else 1e-3
    trainer = trainer_of(QATTrainer, directory / name, batch, qat=RECIPES[name], learning_rate=rate)
    trainer.calibrate()
    calibrated = result(trainer)["state"]
    trainer.evaluate()
    trainer.train()
    return {"calibrated": calibrated, **result(trainer)}


def saved(directory: Path, batch: int, resume: Path | None = None) -> dict[str, object]:
    """Ten steps on 77 images, whose last batches are uneven, with a checkpoint after the fifth."""
    changes = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    trainer = trainer_of(Logged, directory, batch, 77, max_steps=10, load_best_model_at_end=True, **changes)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return result(trainer)


def refused(directory: Path, batch: int) -> str:
    """What is said where one image of the second process has NaN in it."""
    data = [images(16)[k] for k in range(16)]
    data[12]["pixel_values"][0, 0, 0] = float("nan")
    try:
        trainer_of(QATTrainer, directory / "refused", batch).calibrate(data)
    except CalibrationError as error:
        return str(error)
    return ""


def main(directory: Path, batch: int) -> None:
    """Everything, ending in a training that is killed where there are two."""
    found = {name: trained(directory, name, batch) for name in RECIPES}
    found["refused"] = refused(directory, batch)
    own = trainer_of(OwnLoss, directory / "own", batch, max_steps=5, gradient_accumulation_steps=2)
    own.train()
    found["own loss"] = result(own)
    found["saved"] = saved(directory / "saved", batch)
    if (directory / "alone").exists():
        found["resumed"] = saved(directory / "resumed", batch, directory / "alone" / "saved" / "checkpoint-5")
    torch.save(found, directory / f"{RANK}.pt")
    if WORLD > 1:
        trainer_of(Killed, directory / "killed", batch, save_strategy="steps", save_steps=4).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
