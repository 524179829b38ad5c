"""What `QATTrainer` refuses, before time is spent or weights are lost without a word."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence, Sized
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.trainer_utils import has_length

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CalibrationError, ConfigError, StageError, WeightsError, listed
from hf_qat.model.prepare import require_config, require_python
from hf_qat.model.state import require_stage, state_of
from hf_qat.quantization.quantizer import fake_quantizers


def check_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments that a fake-quantized model cannot honour.

    Raises:
        ConfigError: several GPUs in one process, evaluation in half precision, gradient checkpointing that offloads
            or is to be compiled, or what works by hooks on layers.
    """
    if args.n_gpu > 1:
        script = shlex.join(sys.argv) if sys.argv[0].endswith(".py") else "your_script.py"
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process: Trainer would use nn.DataParallel, whose copies lose the ranges that "
            f"they observe. Start one process per GPU:\n    accelerate launch --num_processes {args.n_gpu} {script}\n"
            "or let the process see a single one, by CUDA_VISIBLE_DEVICES=0."
        )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            raise ConfigError(
                f"{name}=True casts the model itself, scales included, and training would go on with what is left of "
                "them. Leave it out; fp16=True and bf16=True are fine, they cast only what is computed."
            )
    _check_checkpointing(args)
    _check_hooks(args)


def _check_checkpointing(args: TrainingArguments) -> None:
    """Refuse the ways of gradient checkpointing that a captured graph does not have."""
    asked = [name for name in ("activation_checkpointing", "gradient_checkpointing") if getattr(args, name, False)]
    for name in asked[:1]:
        if (getattr(args, f"{name}_kwargs", None) or {}).get("offload"):
            raise ConfigError(
                f"{name}_kwargs has offload=True, and a captured graph keeps what its blocks begin with where it is. "
                "Leave it out."
            )
        if args.torch_compile:
            raise ConfigError(
                f"{name}=True and torch_compile=True: the compiler decides itself what to compute again, and a "
                "captured graph leaves it to it. Leave one of them out."
            )


def _check_hooks(args: TrainingArguments) -> None:
    """Refuse what Trainer does by hooks on the layers inside a captured part, which no graph calls."""
    if args.neftune_noise_alpha is not None:
        raise ConfigError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} has no effect on a captured graph, which calls no hooks "
            "of its embeddings. Leave it out; noise in what the model gets can be added by the data_collator."
        )
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        raise ConfigError(
            "debug='underflow_overflow' sees nothing of a captured graph, which calls no hooks of its layers. Leave "
            "it out: steps with gradients of NaN or infinity are left out and named, and analyze(model, batches) "
            "shows the layers one by one."
        )


def check_teacher(teacher: object, model: nn.Module | None) -> None:
    """Refuse what cannot be a teacher of `model`.

    Raises:
        ConfigError: neither a module nor `"float"`, the model itself, or `"float"` where the float model is gone.
    """
    if teacher == "float":
        if model is not None and state_of(model) is not None:
            raise ConfigError(
                'teacher="float" copies the model before it is prepared, and this one is prepared already: pass the '
                "float model itself as the teacher."
            )
    elif isinstance(teacher, str):
        if model is not None and not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"teacher={teacher!r} is read by from_pretrained of the model's class, and {type(model).__name__} is "
                "none of transformers': pass the float model itself as the teacher."
            )
    elif teacher is not None and not isinstance(teacher, nn.Module):
        raise ConfigError(
            'teacher must be a float model, a directory or Hub id of one, "float" for a copy of the model, or None, '
            f"not {teacher!r}."
        )
    elif teacher is not None and teacher is model:
        raise ConfigError('the teacher is the model itself, which is about to change: teacher="float" makes a copy.')


def check_train_set(dataset: object) -> None:
    """Refuse a train set without a single example; one of unknown length passes.

    Raises:
        CalibrationError: its length is 0.
    """
    if isinstance(dataset, Sized) and has_length(dataset) and len(dataset) == 0:
        raise CalibrationError("train_dataset is empty: there is nothing to calibrate from and to train on.")


def check_distribution(trainer: Trainer) -> None:
    """Refuse ways of splitting a model that a fake-quantized one does not survive.

    Raises:
        ConfigError: DeepSpeed is on; or FSDP of version 1, with activation checkpointing, or on CPUs.
    """
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed is on: it casts and flattens all parameters, scales included, and saves none of the buffers "
            "that hold ranges. Turn it off; `accelerate launch --num_processes N` without it uses all GPUs, and "
            "fsdp_version: 2 splits a model that is too large for one."
        )
    by_launcher = trainer.args.world_size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if (trainer.args.fsdp or by_launcher) and not trainer.is_fsdp_enabled:
        raise ConfigError(
            "fsdp is asked for, and accelerate splits no model on CPUs: it would train whole copies without a word. "
            "Leave it out of the TrainingArguments and of the file of `accelerate config`."
        )
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_version is {plugin.fsdp_version}, which flattens scales together with weights. Set fsdp_version: 2 "
            "in the file of `accelerate config`, or fsdp_config={'version': 2} in the TrainingArguments."
        )
    if plugin is not None and plugin.activation_checkpointing:
        raise ConfigError(
            "activation_checkpointing of FSDP is on, which wraps layers that a captured graph does not call. Turn it "
            "off; gradient_checkpointing=True of the TrainingArguments computes the graph's own blocks again."
        )


def check_model(model: nn.Module, config: QATConfig | None) -> None:
    """Refuse a model that cannot be trained quantization-aware; a float or a prepared one passes.

    Args:
        model: what the user gave.
        config: the recipe that the user gave with it.

    Raises:
        CaptureError: compiled, or TorchScript.
        ConfigError: `config` is no `QATConfig`.
        StageError: converted, or prepared by another recipe than `config`.
        WeightsError: weights in another type than float32.
    """
    require_python(model)
    if config is not None:
        require_config(config)
    state = state_of(model)
    if state is not None:
        require_stage(model, Stage.PREPARED, "train")
        if config is not None and config != state.config:
            raise StageError(
                "qat_config differs from the config that the model was prepared with: leave qat_config out, or give "
                "the float model."
            )
    other = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in other))
        raise WeightsError(
            f"the weights of {type(model).__name__} are {names}, and steps as small as those of this training vanish "
            "in anything less than float32. Load it with from_pretrained(..., dtype=torch.float32), or call "
            "model.float(); bf16=True in the TrainingArguments still computes in bfloat16."
        )


def check_resumable(model: nn.Module, checkpoint: Path) -> None:
    """Refuse a checkpoint of a float training, whose weights would load and whose optimizer would not.

    Args:
        model: prepared.
        checkpoint: a directory; one without weights in files of safetensors passes.

    Raises:
        WeightsError: it holds weights, and no scale or range.
    """
    paths = tuple(f"{path}." for path in fake_quantizers(model))
    wanted = {key for key in model.state_dict() if key.startswith(paths)}
    found = {key for file in checkpoint.glob("*.safetensors") for key in _keys_in(file)}
    if wanted and found and wanted.isdisjoint(found):
        raise WeightsError(
            f"{checkpoint} is a checkpoint of a float training: it has none of the {len(wanted)} scales and ranges of "
            f"the prepared {type(model).__name__}, so there is nothing to resume. Load it as the model, by "
            "from_pretrained, and train that without resume_from_checkpoint, in an output_dir of its own."
        )


def _keys_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def check_loaded(model: nn.Module, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuse a checkpoint that did not fill the whole model, of which Trainer would only warn.

    Args:
        model: what the checkpoint was loaded into.
        missing, unexpected: keys of the model that were not in it, and the other way round.

    Raises:
        WeightsError: with the first keys of either kind.
    """
    tensors = model.state_dict()
    loaded = {tensor.data_ptr() for key, tensor in tensors.items() if key not in missing}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    # Of tied weights a checkpoint holds one.
    lost = [key for key in missing if key not in ignored and tensors[key].data_ptr() not in loaded]
    if lost or unexpected:
        raise WeightsError(
            f"the checkpoint does not fit {type(model).__name__}: {_keys('missing', lost)}, "
            f"{_keys('unexpected', unexpected)}. Resume from a checkpoint that QATTrainer wrote, with the model and "
            "the qat_config of that run."
        )


def _keys(kind: str, keys: Sequence[str]) -> str:
    return f"{len(keys)} {kind} keys" + (f" ({listed(keys)})" if keys else "")
