"""QATTrainer: the Trainer it replaces, what it refuses, and calibration."""

import copy
import inspect
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, default_data_collator

from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CalibrationError, ConfigError, WeightsError
from hf_qat.model.calibration import calibrate
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.state import state_of
from hf_qat.model.switches import fake_quant_disabled, freeze_batch_norm
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.trainer import QATTrainer
from tests.models import HUGGING_FACE, LABELS, resnet, tiny_yolos
from tests.training import FOLLOWED, arguments, differing, images, prepared, recipe, trainer_of, values, values_in, vit


class Record(TrainerCallback):
    """The pixels that the model gets in training, through a hook on its forward."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, module, args, kwargs):
        if module.training:
            self.batches.append(kwargs["pixel_values"].clone())


class TestDropIn:
    def test_everything_that_trainer_takes_is_taken(self, tmp_path: Path):
        class Nothing(Exception):
            pass

        def refuse(*args: object, **kwargs: object) -> None:
            inspect.signature(Trainer).bind(*args[1:], **kwargs)
            raise Nothing

        others = {name: None for name in inspect.signature(Trainer).parameters if name not in ("model", "args")}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Nothing):
            patch.setattr(Trainer, "__init__", refuse)
            QATTrainer(resnet(), arguments(tmp_path), **others)

    def test_an_argument_that_trainer_does_not_take_is_refused(self, tmp_path: Path):
        with pytest.raises(TypeError, match="tokeniser"):
            QATTrainer(resnet(), arguments(tmp_path), tokeniser=None)

    def test_arguments_are_taken_in_the_order_of_trainer(self, tmp_path: Path):
        args, train, evaluation = arguments(tmp_path), images(16), images(8, seed=1)
        for kind in (Trainer, QATTrainer):
            trainer = kind(vit(), args, default_data_collator, train, evaluation)
            assert trainer.data_collator is default_data_collator
            assert trainer.train_dataset is train and trainer.eval_dataset is evaluation

    def test_the_model_stays_the_same_object_of_its_own_class(self, tmp_path: Path):
        model = vit()
        kind, parameters = type(model), dict(model.named_parameters())
        trainer = trainer_of(model, tmp_path)
        assert trainer.model is model and type(model) is kind
        assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
        assert state_of(model).stage == "prepared"

    def test_columns_and_labels_are_those_of_the_float_model(self, tmp_path: Path):
        plain = Trainer(vit(), arguments(tmp_path), train_dataset=images(4))
        ours = trainer_of(vit(), tmp_path)
        plain._set_signature_columns_if_needed()
        ours._set_signature_columns_if_needed()
        assert sorted(ours._signature_columns) == sorted(plain._signature_columns)
        assert (ours.label_names, ours.can_return_loss) == (plain.label_names, plain.can_return_loss)
        assert ours.model_accepts_loss_kwargs == plain.model_accepts_loss_kwargs

    def test_metrics_best_model_and_checkpoints_work_as_ever(self, tmp_path: Path):
        seen = []

        def accuracy(prediction) -> dict[str, float]:
            seen.append((prediction.predictions.shape, prediction.label_ids.shape))
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        trainer = trainer_of(
            prepared(vit),
            tmp_path,
            compute_metrics=accuracy,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            max_steps=6,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
        )
        trainer.train()
        assert set(seen) == {((10, LABELS), (10,))}
        scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
        assert len(scores) == 3 and trainer.state.best_metric == max(scores)
        assert len(list(tmp_path.glob("checkpoint-*"))) <= 2
        assert trainer.evaluate()["eval_accuracy"] == max(scores)
        saved = values_in(Path(trainer.state.best_model_checkpoint))
        assert differing(values(trainer.model), saved) == []

    @pytest.mark.parametrize("name", ["yolos", pytest.param("detr", marks=pytest.mark.slow)])
    def test_boxes_train_through_a_collator_of_the_users(self, tmp_path: Path, name: str):
        case = HUGGING_FACE[name]
        rows = [{"pixel_values": p, "labels": b} for p, b in zip(case.pixels(8), case.labels(8), strict=True)]

        def collate(batch: list[dict]) -> dict:
            return {
                "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
                "labels": [row["labels"] for row in batch],
            }

        args = arguments(tmp_path, max_steps=2)
        trainer = QATTrainer(case.make(), args, qat_config=recipe(), train_dataset=rows, data_collator=collate)
        trainer.train()
        assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)

    def test_training_makes_the_loss_less(self, tmp_path: Path):
        trainer = trainer_of(prepared(resnet), tmp_path, max_steps=24, learning_rate=1e-2)
        trainer.calibrate()
        before = trainer.evaluate(images(16))["eval_loss"]
        trainer.train()
        assert trainer.evaluate(images(16))["eval_loss"] < 0.7 * before

    @pytest.mark.slow
    def test_a_new_model_is_prepared_for_every_training(self, tmp_path: Path):
        made = []

        def make() -> nn.Module:
            made.append(vit())
            return made[-1]

        trainer = trainer_of(None, tmp_path, model_init=make, max_steps=2)
        assert trainer.model is made[0] and state_of(made[0]).stage == "prepared"
        results = []
        for _ in range(2):
            trainer.train()
            assert trainer.model is made[-1] and state_of(made[-1]).stage == "prepared"
            results.append(values(trainer.model))
        assert len(made) == 3
        assert differing(*results) == []

    def test_images_of_a_size_that_the_config_does_not_know_are_captured(self, tmp_path: Path):
        trainer = trainer_of(resnet(), tmp_path, train_dataset=images(8, size=48), eval_dataset=images(8, size=48))
        assert not hasattr(trainer.model.config, "image_size")
        trainer.train()

    def test_without_a_train_set_the_shape_comes_from_the_evaluation_set(self, tmp_path: Path):
        evaluation = {"easy": images(8, size=48), "hard": images(8, size=48)}
        trainer = trainer_of(resnet(), tmp_path, train_dataset=None, eval_dataset=evaluation)
        trainer.calibrate(images(8, size=48))
        assert {"eval_easy_loss", "eval_hard_loss"} <= trainer.evaluate().keys()

    def test_without_data_the_shape_comes_from_the_config(self, tmp_path: Path):
        trainer = QATTrainer(vit(), arguments(tmp_path))
        assert state_of(trainer.model).config == QATConfig()

    def test_a_stream_trains(self, tmp_path: Path):
        stream = images(16).to_iterable_dataset()
        trainer = trainer_of(prepared(resnet), tmp_path, train_dataset=stream, max_steps=3)
        trainer.train()
        assert trainer.state.global_step == 3

    def test_a_prepared_model_keeps_its_config_and_its_ranges(self, tmp_path: Path):
        model = prepare_qat(resnet(), recipe(target="w4a8"), {"pixel_values": torch.randn(2, 3, 32, 32)})
        calibrate(model, [torch.randn(8, 3, 32, 32)])
        before = values(model)
        trainer = QATTrainer(model, arguments(tmp_path, learning_rate=0.0), train_dataset=images(8))
        freeze_batch_norm(model)
        trainer.train()
        changed = [key for key in differing(before, values(model)) if "running" not in key and "tracked" not in key]
        assert changed == []
        assert state_of(model).config.target == "w4a8"

    def test_mixed_precision_keeps_float32_weights(self, tmp_path: Path):
        trainer = trainer_of(prepared(resnet), tmp_path, bf16=True)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


class TestRefusals:
    def test_half_precision_weights(self, tmp_path: Path):
        with pytest.raises(WeightsError, match="bfloat16"):
            trainer_of(resnet().bfloat16(), tmp_path)

    def test_half_precision_weights_of_a_new_model(self, tmp_path: Path):
        with pytest.raises(WeightsError, match="bfloat16"):
            trainer_of(None, tmp_path, model_init=lambda: resnet().bfloat16())

    def test_several_gpus_without_a_launcher(self, tmp_path: Path):
        args = arguments(tmp_path)
        args._n_gpu = 2
        with pytest.raises(ConfigError, match="accelerate launch --num_processes 2"):
            QATTrainer(resnet(), args, train_dataset=images(4))

    def test_a_teacher_of_other_classes(self, tmp_path: Path):
        teacher = resnet()
        teacher.classifier[1] = nn.Linear(16, 7)
        with pytest.raises(ConfigError, match="same classes"):
            trainer_of(prepared(resnet), tmp_path, teacher=teacher)

    def test_a_teacher_of_other_boxes(self, tmp_path: Path):
        case = HUGGING_FACE["yolos"]
        rows = [{"pixel_values": pixels} for pixels in case.pixels(4)]
        with pytest.raises(ConfigError, match="must be trained on the same classes"):
            trainer_of(case.make(), tmp_path, teacher=tiny_yolos(7, 5), train_dataset=rows)

    def test_calibration_without_data(self, tmp_path: Path):
        trainer = trainer_of(vit(), tmp_path, train_dataset=None)
        with pytest.raises(CalibrationError, match="train_dataset="):
            trainer.calibrate()

    def test_calibration_from_an_empty_set(self, tmp_path: Path):
        trainer = trainer_of(prepared(vit), tmp_path)
        with pytest.raises(CalibrationError, match="no batches"):
            trainer.calibrate(images(16).select([]))

    def test_an_empty_train_set(self, tmp_path: Path):
        with pytest.raises(CalibrationError, match="train_dataset is empty"):
            trainer_of(vit(), tmp_path, train_dataset=images(16).select([]))

    @pytest.mark.slow
    def test_a_checkpoint_of_another_config(self, tmp_path: Path):
        trainer_of(prepared(vit), tmp_path, save_strategy="steps", save_steps=2).train()
        other = trainer_of(prepared(vit, **FOLLOWED), tmp_path, qat=FOLLOWED)
        with pytest.raises(WeightsError):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class TestCalibration:
    def test_it_happens_before_the_first_step(self, tmp_path: Path):
        class Observed(TrainerCallback):
            first: list[int] = []

            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step == 0:
                    self.first = [int(q.observed) for q in fake_quantizers(model).values()]

        watch, frozen = Observed(), {"freeze_bn_at": 0.0, "freeze_ranges_at": 0.0}
        trainer = trainer_of(prepared(resnet, **frozen), tmp_path, callbacks=[watch], qat=frozen)
        assert {int(q.observed) for q in fake_quantizers(trainer.model).values()} == {0}
        trainer.train()
        assert set(watch.first) == {1}

    @pytest.mark.slow
    def test_it_is_that_of_calibrate_on_the_batches_that_training_sees_first(self, tmp_path: Path):
        record = Record()
        float_model = vit()
        Trainer(copy.deepcopy(float_model), arguments(tmp_path), train_dataset=images(16), callbacks=[record]).train()
        expected = prepare_qat(copy.deepcopy(float_model), recipe(), {"pixel_values": torch.randn(2, 3, 32, 32)})
        calibrate(expected, record.batches[:2])
        trainer = trainer_of(float_model, tmp_path)
        trainer.calibrate()
        assert differing(values(trainer.model), values(expected)) == []

    @pytest.mark.slow
    def test_its_effort_is_that_of_the_config_and_what_is_said_wins(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("hf_qat.model.reconstruction.STEPS", 4)
        best, fast, told = (
            trainer_of(resnet(), tmp_path, qat={"target": "w4a4", "calibration_effort": effort})
            for effort in ("best", "fast", "best")
        )
        best.calibrate()
        fast.calibrate(effort="best")
        told.calibrate(effort="fast")
        assert differing(values(best.model), values(fast.model)) == []
        assert differing(values(best.model), values(told.model))

    @pytest.mark.slow
    def test_training_after_calibrate_does_not_calibrate_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        calls = []

        def called(*args: object, **options: object) -> nn.Module:
            calls.append(args)
            return calibrate(*args, **options)

        monkeypatch.setattr("hf_qat.trainer.trainer.calibrate", called)
        trainer = trainer_of(vit(), tmp_path, save_strategy="steps", save_steps=2)
        trainer.calibrate()
        trainer.train()
        trainer_of(vit(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert len(calls) == 1
        trainer_of(vit(), tmp_path).train()
        assert len(calls) == 2

    def test_evaluation_right_after_it_is_that_of_the_calibrated_model(self, tmp_path: Path):
        trainer = trainer_of(prepared(vit), tmp_path)
        trainer.calibrate()
        loss = trainer.evaluate()["eval_loss"]
        data = images(10, seed=1)
        with torch.no_grad():
            expected = trainer.model.eval()(pixel_values=data["pixel_values"][:], labels=data["labels"][:]).loss
        assert loss == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("how", ["evaluate", pytest.param("predict", marks=pytest.mark.slow)])
    def test_a_model_without_ranges_is_calibrated_before_it_is_measured(
        self, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
    ):
        losses = []
        for explicit in (True, False):
            trainer = trainer_of(prepared(vit), tmp_path)
            torch.manual_seed(1)
            if explicit:
                trainer.calibrate()
            metrics = trainer.evaluate() if how == "evaluate" else trainer.predict(images(10, seed=1)).metrics
            losses.append(metrics["eval_loss" if how == "evaluate" else "test_loss"])
            assert ("calibrated first, on the train set" in caplog.text) is not explicit
        assert losses[0] == losses[1]

    def test_without_a_train_set_it_is_calibrated_on_what_it_is_measured_on(self, tmp_path: Path):
        trainer = trainer_of(vit(), tmp_path, train_dataset=None)
        loss = trainer.evaluate()["eval_loss"]
        expected = trainer_of(prepared(vit), tmp_path, train_dataset=None)
        expected.calibrate(images(10, seed=1))
        assert loss == expected.evaluate()["eval_loss"]

    def test_with_quantizers_off_a_model_without_ranges_is_measured_as_it_is(self, tmp_path: Path):
        trainer = trainer_of(prepared(vit), tmp_path)
        with fake_quant_disabled(trainer.model):
            loss = trainer.evaluate()["eval_loss"]
        assert {int(q.observed) for q in fake_quantizers(trainer.model).values()} == {0}
        plain = Trainer(vit(), arguments(tmp_path), eval_dataset=images(10, seed=1))
        assert loss == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)

    @pytest.mark.slow
    def test_bias_correction_is_the_configs_to_choose(self, tmp_path: Path):
        biases = {}
        for correct in (True, False):
            trainer = trainer_of(prepared(vit, bias_correction=correct), tmp_path, qat={"bias_correction": correct})
            trainer.calibrate()
            biases[correct] = trainer.model.classifier.bias.detach()
        assert torch.equal(biases[False], vit().classifier.bias)
        assert not torch.equal(biases[True], biases[False])

    def test_training_sees_the_batches_and_random_numbers_that_it_would_have_seen(self, tmp_path: Path):
        def noisy(batch: list[dict]) -> dict:
            pixels = torch.stack([row["pixel_values"] for row in batch])
            noise = torch.randn_like(pixels) + np.random.rand() + random.random()
            return {"pixel_values": pixels + noise, "labels": torch.stack([row["labels"] for row in batch])}

        seen = []
        for kind, more in ((Trainer, {}), (QATTrainer, {"qat_config": recipe(), "teacher": "float"})):
            record = Record()
            torch.manual_seed(0)
            model, args = vit(hidden_dropout_prob=0.1), arguments(tmp_path, max_steps=6)
            kind(model, args, train_dataset=images(16), data_collator=noisy, callbacks=[record], **more).train()
            seen.append(torch.stack(record.batches))
        assert len(seen[0]) == 6
        assert torch.equal(*seen)
