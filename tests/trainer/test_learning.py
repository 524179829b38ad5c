"""QATTrainer: what a step learns from and how fast: parameter groups and distillation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_qat.model.state import state_of
from hf_qat.trainer.trainer import QATTrainer
from tests.models import HUGGING_FACE, LABELS, resnet, segformer
from tests.training import differing, images, prepared, trainer_of, values, values_in, vit


class TestOptimizer:
    def groups(self, trainer: QATTrainer) -> dict[str, dict]:
        """Parameter name → its group."""
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        return {names[id(p)]: group for group in trainer.optimizer.param_groups for p in group["params"]}

    @pytest.mark.parametrize("how", ["arguments", "class"])
    def test_scales_have_no_weight_decay_and_a_higher_rate(self, tmp_path: Path, how: str):
        changes, qat = {"weight_decay": 0.1, "learning_rate": 1e-3}, {"scale_lr_multiplier": 5.0}
        if how == "class":
            changes["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9})
        trainer = trainer_of(prepared(vit, **qat), tmp_path, qat=qat, **changes)
        trainer.create_optimizer()
        groups = self.groups(trainer)
        assert groups.keys() == dict(trainer.model.named_parameters()).keys()
        for name, group in groups.items():
            if name.endswith(("log2_scale", "offset")):
                assert (group["lr"], group["weight_decay"]) == (5e-3, 0.0), name
            else:
                assert group["lr"] == 1e-3
                decays = not name.endswith("bias") and "layernorm" not in name
                assert group["weight_decay"] == (0.1 if decays else 0.0), name

    def test_the_schedule_of_the_learning_rate_applies_to_both(self, tmp_path: Path):
        rates, qat = [], {"scale_lr_multiplier": 5.0}

        class Rates(TrainerCallback):
            def on_step_end(self, args, state, control, optimizer=None, **kwargs):
                rates.append([group["lr"] for group in optimizer.param_groups])

        trainer = trainer_of(prepared(vit, **qat), tmp_path, callbacks=[Rates()], qat=qat)
        trainer.train()
        expected = [1e-3 * (1 - step / 4) for step in (1, 2, 3, 4)]  # linear, to 0
        np.testing.assert_allclose(rates, [[rate, rate, 5 * rate] for rate in expected])
        logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        np.testing.assert_allclose(logged, [1e-3 * (1 - step / 4) for step in range(4)])

    def test_an_optimizer_of_the_users_is_left_alone(self, tmp_path: Path):
        model = prepared(vit)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = trainer_of(model, tmp_path, optimizers=(optimizer, None))
        trainer.train()
        assert len(optimizer.param_groups) == 1

    def test_an_optimizer_without_the_scales_is_warned_about(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        model = vit()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = trainer_of(model, tmp_path, optimizers=(optimizer, None))
        with caplog.at_level("WARNING"):
            trainer.create_optimizer()
        count = sum(1 for name, _ in model.named_parameters() if name.endswith(("log2_scale", "offset")))
        assert f"lacks {count} of the {count} learned scales" in caplog.text


class TestDistillation:
    @pytest.mark.parametrize(
        ("make", "steps"),
        [
            pytest.param(vit, 1, marks=pytest.mark.slow, id="scales itself-1"),
            pytest.param(vit, 2, id="scales itself-2"),
            pytest.param(HUGGING_FACE["convnext"].make, 1, marks=pytest.mark.slow, id="does not-1"),
            pytest.param(HUGGING_FACE["convnext"].make, 2, id="does not-2"),
        ],
    )
    def test_the_gradient_is_that_of_the_mixed_loss(self, tmp_path: Path, make, steps: int):
        """Of a model that divides its loss by `num_items_in_batch`, and of one whose loss Trainer divides."""

        class Gradient(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                self.value = model.classifier.bias.grad.clone()

        gradient = Gradient()
        teacher = make()
        teacher.classifier.bias.data.add_(torch.arange(LABELS) / 2)
        qat = {"distillation_weight": 0.3, "distillation_temperature": 3.0}
        trainer = trainer_of(
            prepared(make, **qat),
            tmp_path,
            teacher=teacher,
            qat=qat,
            callbacks=[gradient],
            train_dataset=images(8),
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.0,
        )
        assert trainer.model_accepts_loss_kwargs == (make is vit)
        trainer.train()
        data = images(8)
        pixels, labels = data["pixel_values"][:], data["labels"][:]
        student = trainer.model.train()
        student.zero_grad()
        logits = student(pixel_values=pixels).logits
        with torch.no_grad():
            taught = teacher.eval()(pixel_values=pixels).logits
        task = nn.functional.cross_entropy(logits, labels)
        soft = nn.functional.kl_div((logits / 3).log_softmax(1), (taught / 3).softmax(1), reduction="batchmean")
        loss = 0.7 * task + 0.3 * 9 * soft
        loss.backward()
        torch.testing.assert_close(gradient.value, student.classifier.bias.grad, rtol=1e-4, atol=1e-6)
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["qat_distillation_loss"] == pytest.approx(9 * soft.item(), rel=1e-4)

    @pytest.mark.slow
    def test_pixels_are_taught_too(self, tmp_path: Path):
        masks = (torch.arange(8 * 32 * 32) % LABELS).view(8, 32, 32)
        rows = [{"pixel_values": p, "labels": m} for p, m in zip(images(8)["pixel_values"][:], masks, strict=True)]
        trainer = trainer_of(segformer(), tmp_path, teacher="float", train_dataset=rows, max_steps=2)
        trainer.train()
        assert trainer.state.log_history[0]["qat_distillation_loss"] > 0

    @pytest.mark.slow
    def test_the_float_model_teaches_as_it_was_given(self, tmp_path: Path):
        trainer = trainer_of(vit(), tmp_path, teacher="float")
        teacher = trainer.distillation.teacher
        assert state_of(teacher) is None and not teacher.training
        trainer.train()
        assert differing(values(teacher), values(vit())) == []

    @pytest.mark.slow
    def test_a_teacher_is_read_from_a_directory_or_the_hub(self, tmp_path: Path):
        taught = vit()
        taught.classifier.bias.data.add_(1.0)
        taught.save_pretrained(tmp_path / "teacher")
        trainer = trainer_of(vit(), tmp_path / "run", teacher=str(tmp_path / "teacher"))
        assert differing(values(trainer.distillation.teacher), values(taught)) == []

    @pytest.mark.slow
    def test_the_teacher_is_in_no_checkpoint(self, tmp_path: Path):
        trainer = trainer_of(vit(), tmp_path, teacher="float", save_strategy="steps", save_steps=2)
        trainer.train()
        assert values_in(tmp_path / "checkpoint-2").keys() == trainer.model.state_dict().keys()
        assert not any(module is trainer.distillation.teacher for module in trainer.model.modules())

    def test_evaluation_reports_the_loss_of_the_task_alone(self, tmp_path: Path):
        losses = []
        for teacher in (None, resnet()):
            trainer = trainer_of(prepared(resnet), tmp_path, teacher=teacher)
            trainer.calibrate()
            losses.append(trainer.evaluate()["eval_loss"])
        assert losses[0] == losses[1]

    def test_a_loss_of_the_users_is_mixed_in(self, tmp_path: Path):
        def loss_function(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
            return outputs.logits.sum() * 0 + 5.0

        trainer = trainer_of(
            vit(),
            tmp_path,
            teacher="float",
            compute_loss_func=loss_function,
            max_steps=1,
            qat={"distillation_weight": 0.4},
        )
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss"] == pytest.approx(0.6 * 5.0 + 0.4 * logged["qat_distillation_loss"], rel=1e-5)
