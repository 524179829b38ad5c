import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments

from hf_qat.errors import CalibrationError, CaptureError, ConfigError, StageError, WeightsError
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from hf_qat.trainer.checks import (
    check_arguments,
    check_distribution,
    check_loaded,
    check_model,
    check_resumable,
    check_teacher,
    check_train_set,
)
from tests.models import hand_written, made_once, vit
from tests.training import arguments, images, recipe


@made_once
def prepared() -> nn.Module:
    return prepare_qat(hand_written(), recipe(), torch.randn(2, 3, 16, 16))


def test_ordinary_arguments_pass(tmp_path: Path):
    check_arguments(arguments(tmp_path, bf16=True, gradient_accumulation_steps=2))


def test_several_gpus_in_one_process_are_refused_with_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my images"])
    args = arguments(tmp_path)
    args._n_gpu = 4  # as found on a machine that has them
    with pytest.raises(ConfigError, match="accelerate launch --num_processes 4 train.py --data 'my images'\n"):
        check_arguments(args)


def test_outside_a_script_the_line_to_type_has_a_name_to_fill_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel"])
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ConfigError, match="accelerate launch --num_processes 2 your_script.py\n"):
        check_arguments(args)


@pytest.mark.parametrize("name", ["fp16_full_eval", "bf16_full_eval"])
def test_evaluation_that_casts_the_model_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=name):
        check_arguments(arguments(tmp_path, **{name: True}))


CHECKPOINTING = {field.name for field in fields(TrainingArguments)} & {
    "activation_checkpointing",
    "gradient_checkpointing",
}


@pytest.mark.parametrize("name", sorted(CHECKPOINTING))
def test_checkpointing_passes_but_for_what_a_captured_graph_does_not_have(tmp_path: Path, name: str):
    args = arguments(tmp_path)
    setattr(args, name, True)
    check_arguments(args)
    setattr(args, f"{name}_kwargs", {"offload": True})
    with pytest.raises(ConfigError, match=f"{name}_kwargs has offload=True"):
        check_arguments(args)
    setattr(args, f"{name}_kwargs", {"use_reentrant": False})
    args.torch_compile = True
    with pytest.raises(ConfigError, match=f"{name}=True and torch_compile=True"):
        check_arguments(args)


@pytest.mark.parametrize("changes", [{"neftune_noise_alpha": 5.0}, {"debug": "underflow_overflow"}], ids=list)
def test_what_works_by_hooks_on_layers_is_refused(tmp_path: Path, changes: dict):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}.* captured graph"):
        check_arguments(arguments(tmp_path, **changes))


def distributed(asked: bool = False, deepspeed: bool = False, **plugin: object) -> SimpleNamespace:
    """What `check_distribution` reads of a trainer; `plugin` is what accelerate knows of FSDP."""
    defaults = {"fsdp_version": 2, "activation_checkpointing": False}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**defaults, **plugin}))
    return SimpleNamespace(
        args=SimpleNamespace(fsdp=asked, world_size=2),
        is_deepspeed_enabled=deepspeed,
        is_fsdp_enabled=bool(plugin),
        accelerator=SimpleNamespace(state=state),
    )


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (distributed(deepspeed=True), "DeepSpeed is on"),
        (distributed(asked=True), "splits no model on CPUs"),
        (distributed(fsdp_version=1), "Set fsdp_version: 2"),
        (distributed(activation_checkpointing=True), "a captured graph does not call"),
    ],
    ids=["DeepSpeed", "CPUs", "version 1", "activation checkpointing"],
)
def test_splitting_that_a_model_does_not_survive_is_refused(trainer: SimpleNamespace, message: str):
    with pytest.raises(ConfigError, match=message):
        check_distribution(trainer)


def test_fsdp_of_the_launcher_on_cpus_is_refused(monkeypatch: pytest.MonkeyPatch):
    check_distribution(distributed())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="splits no model on CPUs"):
        check_distribution(distributed())


def test_fsdp2_passes():
    check_distribution(distributed(asked=True, fsdp_version=2))


def test_a_float_and_a_prepared_model_pass():
    check_model(hand_written(), recipe())
    check_model(prepared(), None)
    check_model(prepared(), recipe())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_other_than_float32_are_refused(dtype: torch.dtype):
    with pytest.raises(WeightsError, match=rf"HandWritten are {str(dtype)[6:]}, .*dtype=torch.float32"):
        check_model(hand_written().to(dtype), None)


def test_a_converted_model_is_refused():
    model = convert(calibrate(prepared(), [torch.randn(2, 3, 16, 16)]))
    with pytest.raises(StageError, match="cannot train: the model is converted"):
        check_model(model, None)


def test_another_config_than_the_model_was_prepared_with_is_refused():
    with pytest.raises(StageError, match="qat_config differs"):
        check_model(prepared(), recipe(target="w4a8"))


def test_a_model_or_the_float_one_can_teach():
    for teacher in (None, "float", hand_written()):
        check_teacher(teacher, hand_written())
    check_teacher(hand_written(), prepared())


def test_the_model_itself_cannot_teach():
    model = hand_written()
    with pytest.raises(ConfigError, match='teacher="float"'):
        check_teacher(model, model)


def test_the_float_model_cannot_teach_where_it_is_gone():
    with pytest.raises(ConfigError, match="prepared already"):
        check_teacher("float", prepared())


def test_a_name_is_read_by_the_class_of_the_model_and_other_things_cannot_teach():
    check_teacher("somebody/resnet", vit())
    with pytest.raises(ConfigError, match="HandWritten is none of transformers'"):
        check_teacher("resnet50", hand_written())
    with pytest.raises(ConfigError, match="not 50"):
        check_teacher(50, hand_written())


@pytest.mark.parametrize("data", [None, images(2), images(2).to_iterable_dataset(), [{}]])
def test_a_train_set_that_is_none_or_of_unknown_length_passes(data: object):
    check_train_set(data)


@pytest.mark.parametrize("data", [[], images(2).select([])])
def test_an_empty_train_set_is_refused(data: object):
    with pytest.raises(CalibrationError, match="train_dataset is empty"):
        check_train_set(data)


def test_a_full_checkpoint_passes():
    check_loaded(hand_written(), [], [])


def test_missing_and_unexpected_keys_are_named():
    keys = [f"layer.{k}" for k in range(7)]
    with pytest.raises(WeightsError, match=r"1 missing keys \(head.bias\), 7 .*\(layer.0, .* and 2 more\)"):
        check_loaded(hand_written(), ["head.bias"], keys)


def test_a_checkpoint_of_a_float_training_is_refused_and_one_of_ours_is_not(tmp_path: Path):
    check_resumable(prepared(), tmp_path)  # no weights to look at
    for model, name in ((hand_written(), "float"), (prepared(), "ours")):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    check_resumable(prepared(), tmp_path / "ours")
    added = len(prepared().state_dict()) - len(hand_written().state_dict())
    with pytest.raises(WeightsError, match=rf"float is a checkpoint of a float training: it has none of the {added} "):
        check_resumable(prepared(), tmp_path / "float")


def test_the_second_name_of_a_tied_weight_may_be_missing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    check_loaded(model, ["1.weight"], [])
    with pytest.raises(WeightsError, match="2 missing keys"):
        check_loaded(model, ["0.weight", "1.weight"], [])


def test_a_key_that_the_model_never_saves_may_be_missing():
    model = hand_written()
    model._keys_to_ignore_on_save = ["head.bias"]
    check_loaded(model, ["head.bias"], [])


def test_a_compiled_model_is_refused_before_anything_is_done():
    with pytest.raises(CaptureError, match="before torch.compile"):
        check_model(torch.compile(hand_written(), backend="eager"), None)


def test_a_recipe_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="the recipe is 'int8', and must be a QATConfig"):
        check_model(hand_written(), "int8")
