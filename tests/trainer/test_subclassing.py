"""Subclasses of the user's own, with each hook overridden, with and without `super()`: as those of Trainer.

With quantizers off, every training has the losses of the same subclass of the plain Trainer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_qat.model.parameter_groups import scale_parameters
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.measuring import measure
from hf_qat.trainer.trainer import QATTrainer
from tests.exported import accuracy, publisher
from tests.models import resnet
from tests.training import arguments, images, prepared, recipe, vit


#: A subclass of the Trainer that it is given.
Subclass = Callable[[type[Trainer]], type[Trainer]]


def own_loss(base: type[Trainer]) -> type[Trainer]:
    """Takes its loss from the logits, and never calls Trainer's."""

    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.3)
            return (loss, outputs) if return_outputs else loss

    return Mine


def changed_loss(base: type[Trainer]) -> type[Trainer]:
    """Adds a penalty to Trainer's loss."""

    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = 2 * loss + outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    return Mine


def own_step(base: type[Trainer]) -> type[Trainer]:
    """Forward and backward by hand."""

    class Mine(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = 3 * model(**self._prepare_inputs(inputs)).loss
            self.accelerator.backward(loss)
            return loss.detach()

    return Mine


def changed_step(base: type[Trainer]) -> type[Trainer]:
    """Trainer's, on mirrored images."""

    class Mine(base):
        def training_step(self, model, inputs, *args, **kwargs):
            inputs = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
            return super().training_step(model, inputs, *args, **kwargs)

    return Mine


def own_optimizer(base: type[Trainer]) -> type[Trainer]:
    """Makes one by hand, and never calls Trainer's."""

    class Mine(base):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
            return self.optimizer

    return Mine


def changed_optimizer(base: type[Trainer]) -> type[Trainer]:
    """Trainer's, at a rate of its own for the classifier."""

    class Mine(base):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            for group in optimizer.param_groups[:2]:
                group["lr"] = 0.01
            return optimizer

    return Mine


HOOKS = [own_loss, changed_loss, own_step, changed_step, own_optimizer, changed_optimizer]


@pytest.mark.parametrize(
    "subclass",
    [pytest.param(hook, marks=[] if hook in (own_loss, changed_step) else pytest.mark.slow) for hook in HOOKS],
    ids=lambda subclass: subclass.__name__,
)
@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_subclass_trains_as_one_of_trainer_does(tmp_path: Path, subclass: Subclass, accumulated: int):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulated, per_device_train_batch_size=2)
    args.max_grad_norm = 0.0
    plain = subclass(Trainer)(vit(), args, train_dataset=images(16))
    ours = subclass(QATTrainer)(vit(), args, train_dataset=images(16), qat_config=recipe(bias_correction=False))
    plain.train()
    with fake_quant_disabled(ours.model):
        ours.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
    assert len(losses[0]) == 4 and losses[0][0] != losses[0][3]
    # Trainer takes a mean over a batch for its part of the mean over all accumulated ones, unless it is told.
    excess = accumulated if subclass is own_loss else 1
    np.testing.assert_allclose(losses[1], np.array(losses[0]) / excess, rtol=1e-3)


@pytest.mark.parametrize(
    "subclass",
    [pytest.param(hook, marks=[] if hook in (own_step, changed_optimizer) else pytest.mark.slow) for hook in HOOKS],
    ids=lambda subclass: subclass.__name__,
)
def test_a_subclass_trains_with_quantizers(tmp_path: Path, subclass: Subclass):
    args = arguments(tmp_path, max_steps=12, learning_rate=1e-2, gradient_accumulation_steps=2)
    trainer = subclass(QATTrainer)(prepared(vit), args, train_dataset=images(16))
    scales = [scale.detach().clone() for scale in scale_parameters(trainer.model)]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all("qat_phase" in entry for entry in trainer.state.log_history if "loss" in entry)
    assert not all(map(torch.equal, scales, scale_parameters(trainer.model)))
    assert {int(quantizer.observed > 0) for quantizer in fake_quantizers(trainer.model).values()} == {1}


@pytest.mark.slow
def test_a_loss_of_the_users_own_is_mixed_with_that_of_a_teacher_if_it_calls_super(tmp_path: Path):
    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2)
    logged = []
    for weight in (0.0, 1.0):
        config = recipe(distillation_weight=weight, bias_correction=False)
        trainer = changed_loss(QATTrainer)(vit(), args, train_dataset=images(16), qat_config=config, teacher="float")
        trainer.train()
        logged.append(trainer.state.log_history[0])
    squares = logged[1]["loss"] - 2 * logged[1]["qat_distillation_loss"]  # the penalty alone
    assert 0 < squares < logged[0]["loss"]
    assert logged[0]["qat_distillation_loss"] == pytest.approx(logged[1]["qat_distillation_loss"])


class TestEvaluate:
    def test_one_of_the_users_own_is_left_alone(self, tmp_path: Path):
        class Mine(QATTrainer):
            def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
                return {"eval_mine": 4.0}

        trainer = Mine(prepared(resnet), arguments(tmp_path), train_dataset=images(16), eval_dataset=images(8))
        trainer.calibrate()
        assert trainer.evaluate() == {"eval_mine": 4.0}

    def test_one_that_adds_to_trainers_is_noted_without_what_it_adds(self, tmp_path: Path):
        class Mine(QATTrainer):
            def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
                return {**super().evaluate(*args, **kwargs), "eval_mine": 4.0}

        data = {"train_dataset": images(16), "eval_dataset": images(8), "compute_metrics": accuracy}
        trainer = Mine(prepared(resnet), arguments(tmp_path, eval_strategy="steps", eval_steps=2), **data)
        trainer.calibrate()
        metrics = trainer.evaluate()
        assert metrics["eval_mine"] == 4.0
        trainer.train()
        assert trainer._record.accuracy == {"calibrated": {"accuracy": metrics["eval_accuracy"]}}

    @pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "with super"])
    def test_an_exported_file_is_measured_by_the_prediction_of_a_subclass(self, tmp_path: Path, by_hand: bool):
        """The file always says class 2; the subclass takes that for class 3."""

        class Mine(QATTrainer):
            def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
                if by_hand:
                    with torch.no_grad():
                        logits = model(**self._prepare_inputs(inputs)).logits
                    loss, labels = None, inputs["labels"]
                else:
                    loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
                return loss, torch.as_tensor(logits).roll(1, dims=-1), labels

        trainer = publisher(tmp_path, "int8")
        trainer.__class__ = Mine
        trainer.calibrate()
        file = always_2(trainer.export(tmp_path / "out") / "onnx" / "model.onnx", tmp_path / "always_2.onnx")
        labels = trainer.eval_dataset["labels"][:].numpy()
        measured = measure(trainer, "calibrated", trainer.convert(), file)
        assert measured["onnxruntime"] == {"accuracy": pytest.approx((labels == 3).mean())}
        assert measured["calibrated"] == {"accuracy": trainer.evaluate()["eval_accuracy"]}


def always_2(source: Path, target: Path) -> Path:
    """A file whose classifier has one more bias than that of `source`, so that it always says class 2."""
    file = onnx.load(source)
    output = file.graph.output[0].name
    for node in file.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    bias = onnx.numpy_helper.from_array(np.eye(5, dtype=np.float32)[2] * 1e6, "bias")
    file.graph.initializer.append(bias)
    file.graph.node.append(onnx.helper.make_node("Add", ["before", "bias"], [output]))
    onnx.save(file, target)
    return target


@pytest.mark.slow
def test_a_model_of_the_users_own_init_is_prepared_for_every_training(tmp_path: Path):
    class Mine(QATTrainer):
        def call_model_init(self, trial: Any = None) -> nn.Module:
            model = super().call_model_init(trial)
            self.made = getattr(self, "made", 0) + 1
            return model

    trainer = Mine(None, arguments(tmp_path, max_steps=1), train_dataset=images(16), model_init=lambda: vit())
    trainer.train()
    assert trainer.made == 2
    assert any("quantizer" in name for name, _ in trainer.model.named_modules())


def test_what_is_saved_by_a_subclass_is_still_whole(tmp_path: Path):
    class Mine(QATTrainer):
        def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
            super()._save(output_dir, state_dict)
            (Path(output_dir or self.args.output_dir) / "mine.txt").touch()

    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = Mine(prepared(vit), args, train_dataset=images(16))
    trainer.train()
    trainer.save_model()
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("mine.txt")}
    assert found == {"mine.txt", "checkpoint-1/mine.txt", "checkpoint-2/mine.txt"}
