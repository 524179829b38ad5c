import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, ViTForImageClassification

from hf_qat.config.qat_config import QATConfig
from hf_qat.model.calibration import calibrate
from hf_qat.model.prepare import prepare_qat
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from hf_qat.trainer.callbacks import ScheduleCallback, clipped_weights, freezing_of_batch_norm, needs_calibration
from hf_qat.trainer.trainer import QATTrainer
from tests.models import hand_written, resnet
from tests.training import FOLLOWED, arguments, images, prepared, recipe, trainer_of, vit


class Watch(TrainerCallback):
    """Writes down, just before each optimizer step, what the modules of the model do."""

    def __init__(self) -> None:
        self.phases = ""
        self.statistics: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        norms = {layer.batch_norm_frozen for layer in qat_layers(model).values()}
        ranges = {quantizer.frozen for quantizer in fake_quantizers(model).values()}
        self.phases += {(False, False): "L", (True, False): "F", (True, True): "R"}[(*norms, *ranges)]
        self.statistics.append(torch.cat([b.flatten() for name, b in model.named_buffers() if "running_" in name]))


def trained(directory: Path, watch: Watch, resume: object = None, **changes: object) -> QATTrainer:
    """Train on 16 images; `changes` of the arguments, `qat` those of the recipe."""
    qat = changes.pop("qat", {})
    trainer = QATTrainer(
        prepared(resnet, **qat),
        arguments(directory, **changes),
        qat_config=recipe(**qat),
        train_dataset=images(16),
        eval_dataset=images(8),
        callbacks=[watch],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# Four batches an epoch. Batch norm freezes half way, ranges after three quarters.
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 8}, "LLLLFFRR"),
        ({"max_steps": 1}, "L"),
        pytest.param({"max_steps": 2}, "LF", marks=pytest.mark.slow),
        pytest.param({"max_steps": 3}, "LLF", marks=pytest.mark.slow),
        pytest.param({"max_steps": -1, "num_train_epochs": 1}, "LLFR", marks=pytest.mark.slow),
        pytest.param({"max_steps": -1, "num_train_epochs": 2}, "LLLLFFRR", marks=pytest.mark.slow),
        pytest.param(
            {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}, "LLFR", marks=pytest.mark.slow
        ),
        pytest.param({"max_steps": 4, "gradient_accumulation_steps": 2}, "LLFR", marks=pytest.mark.slow),
        ({"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3}, "LF"),  # 3 batches and 1
        ({"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}, "LLLLFFRR"),
        ({"max_steps": 4, "qat": {"freeze_bn_at": None}}, "FFFR"),
        ({"max_steps": -1, "num_train_epochs": 0}, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_every_optimizer_step_is_made_in_its_phase(tmp_path: Path, changes: dict, expected: str):
    watch = Watch()
    trained(tmp_path, watch, **changes)
    assert watch.phases == expected


@pytest.mark.slow
def test_resuming_goes_on_with_the_phase_of_the_step(tmp_path: Path):
    trained(tmp_path, Watch(), max_steps=8, save_strategy="steps", save_steps=3)
    for step, rest in ((3, "LFFRR"), (6, "RR")):
        watch = Watch()
        trained(tmp_path, watch, resume=str(tmp_path / f"checkpoint-{step}"), max_steps=8)
        assert watch.phases == rest


@pytest.mark.slow
def test_resuming_with_more_steps_goes_by_the_new_number(tmp_path: Path):
    trained(tmp_path, Watch(), max_steps=4, save_strategy="steps", save_steps=4)
    watch = Watch()
    trained(tmp_path, watch, resume=str(tmp_path / "checkpoint-4"), max_steps=12)
    assert watch.phases == "LLFFFRRR"


def test_the_checkpoint_tells_the_phase(tmp_path: Path):
    trained(tmp_path, Watch(), max_steps=4, save_strategy="steps", save_steps=2)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    progress = state["stateful_callbacks"]["ScheduleCallback"]["attributes"]["progress"]
    assert progress == {"phase": "batch norm frozen", "step": 2, "total_steps": 4}


def test_restoring_the_states_of_callbacks_does_no_harm(tmp_path: Path):
    trained(tmp_path, Watch(), max_steps=4, save_strategy="steps", save_steps=3)
    watch = Watch()
    changes = {"max_steps": 4, "restore_callback_states_from_checkpoint": True}
    trainer = trained(tmp_path, watch, resume=str(tmp_path / "checkpoint-3"), **changes)
    assert watch.phases == "R"
    assert trainer.state.log_history[-2]["qat_phase"] == 2.0


def test_batch_norm_statistics_move_until_they_freeze(tmp_path: Path):
    watch = Watch()
    trained(tmp_path, watch, max_steps=6)
    moved = [not torch.equal(a, b) for a, b in zip(watch.statistics, watch.statistics[1:], strict=False)]
    assert watch.phases == "LLLFFR"
    assert moved == [True, True, False, False, False]


@pytest.mark.slow
def test_a_second_training_starts_from_the_first_phase(tmp_path: Path):
    watch = Watch()
    trainer = trained(tmp_path, watch, max_steps=4)
    trainer.train()
    assert watch.phases == "LLFRLLFR"


def test_metrics_are_logged_with_the_loss_and_nowhere_else(tmp_path: Path):
    trainer = trained(tmp_path, Watch(), max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=2)
    with_loss = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["qat_phase"] for entry in with_loss] == [1.0, 2.0]  # after steps 2 and 4
    assert all(0 <= entry["qat_clipped_weights"] < 0.1 for entry in with_loss)
    assert all(0 < entry["qat_scale_drift"] < 0.1 for entry in with_loss)
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others and not any(key.startswith("qat_") for entry in others for key in entry)


def test_tensorboard_has_the_metrics_of_quantization_under_one_prefix(tmp_path: Path):
    """Read from the event file itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's, of what it imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        trainer = trained(tmp_path, Watch(), max_steps=4, logging_steps=2, report_to=["tensorboard"])
        (file,) = tmp_path.rglob("events.out.tfevents.*")
        events = EventAccumulator(str(file)).Reload()
    names = {"phase", "clipped_weights", "oscillating_weights", "scale_drift"}
    assert {f"train/qat_{name}" for name in names} == {tag for tag in events.Tags()["scalars"] if "qat" in tag}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(f"train/qat_{name}")]
        assert found == [(entry["step"], pytest.approx(entry[f"qat_{name}"])) for entry in logged]
    assert [event.value for event in events.Scalars("train/qat_phase")] == [1.0, 2.0]


def test_scale_drift_is_the_mean_distance_in_octaves(tmp_path: Path):
    trainer = trained(tmp_path, Watch(), max_steps=1)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ScheduleCallback))
    callback.initial_scales = torch.cat([q.log2_scale.detach().view(-1) for q in quantizers(trainer.model)])
    for quantizer in quantizers(trainer.model):
        quantizer.set_qparams(quantizer.scale.detach() * 4.0)
    assert callback.metrics(trainer.model)["qat_scale_drift"] == pytest.approx(2.0)


def quantizers(model: nn.Module) -> list:
    return [quantizer for quantizer in fake_quantizers(model).values() if quantizer.learned]


@pytest.mark.slow
def test_without_learned_scales_there_is_no_drift_to_log(tmp_path: Path):
    trainer = trained(tmp_path, Watch(), max_steps=1, qat=FOLLOWED)
    assert "qat_scale_drift" not in trainer.state.log_history[0]
    assert "qat_clipped_weights" in trainer.state.log_history[0]


def test_clipped_weights_are_counted():
    model = prepare_qat(hand_written(), recipe(), torch.randn(2, 3, 16, 16))
    assert clipped_weights(model).item() == 0  # the first scales clip nothing
    weight, scale = model.head.weight, model.head.weight_quantizer.scale
    weight.data[0, :3] = 128 * scale[0]  # beyond 127.5
    weight.data[1, :2] = 127.4 * scale[1]  # rounds to 127
    total = sum(layer.weight.numel() for layer in qat_layers(model).values())
    assert clipped_weights(model).item() == pytest.approx(3 / total)


def test_a_model_needs_calibration_until_it_has_been_calibrated():
    assert not needs_calibration(hand_written())
    model = prepare_qat(hand_written(), recipe(), torch.randn(2, 3, 16, 16))
    assert needs_calibration(model)
    calibrate(model, [torch.randn(2, 3, 16, 16)])
    assert not needs_calibration(model)


@pytest.mark.slow
def test_the_callbacks_can_be_used_with_the_plain_trainer(tmp_path: Path):
    model = prepare_qat(resnet(), recipe(), torch.randn(2, 3, 32, 32))
    calibrate(model, [torch.randn(4, 3, 32, 32)])
    watch = Watch()
    Trainer(model, arguments(tmp_path), train_dataset=images(16), callbacks=[watch, ScheduleCallback()]).train()
    assert watch.phases == "LLFR"


def test_on_resuming_batch_norm_freezes_when_it_would_have_in_the_run_that_began(tmp_path: Path):
    """That began with an untrained net, which nobody can tell of the checkpoint."""
    model = prepare_qat(resnet(), None, {"pixel_values": torch.randn(2, 3, 32, 32)})
    progress = {"phase": "batch norm live", "step": 1, "total_steps": 4, "freeze_bn_at": 0.5}
    saved = {"ScheduleCallback": {"args": {}, "attributes": {"progress": progress}}}
    phases = []
    for state in (
        TrainerState(global_step=1, max_steps=4, stateful_callbacks=saved),
        TrainerState(global_step=0, max_steps=4, stateful_callbacks=saved),  # a new run of the same trainer
    ):
        callback = ScheduleCallback()
        callback.on_train_begin(arguments(tmp_path), state, TrainerControl(), model=model)
        phases.append(callback.schedule.phase)
    assert phases == ["batch norm live", "batch norm frozen"]
    assert freezing_of_batch_norm([callback], QATConfig()) == 0


class StopsAt(TrainerCallback):
    """Ends a training early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.slow
@pytest.mark.parametrize(("step", "warned"), [(1, True), (3, False)])
def test_a_training_that_stops_before_anything_is_quantized_says_so(step: int, warned: bool, tmp_path: Path, caplog):
    untrained = ViTForImageClassification(vit().config)  # learns in float for two steps of eight
    trainer_of(untrained, tmp_path, max_steps=8, callbacks=[StopsAt(step)]).train()
    assert ("ended at step 1 of 8, in the part that an untrained net learns in float" in caplog.text) is warned
