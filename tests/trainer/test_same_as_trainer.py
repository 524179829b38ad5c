"""What transformers' own tests ask of `Trainer`, rewritten by behaviour for a vision model: ours does the same.

Each row of `ROWS` is run with `Trainer` on a float ViT, and with `QATTrainer` on the same one with its quantizers off.
What the row returns must be the same: losses and metrics to a thousandth, steps, learning rates, files and events as
they are. Rows that need a device, several processes or minutes are in files of their own (`test_distributed.py`,
`test_resuming.py`, `test_saving.py`, `test_pushing.py`, `test_modes.py`). `EXCEPTIONS` has what differs, and why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_qat.model.prepare import prepare_qat
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.trainer.trainer import QATTrainer
from tests.exported import accuracy
from tests.training import arguments, images, recipe, vit


#: Behaviour of Trainer → why ours has another.
EXCEPTIONS = {
    "logging_nan_inf_filter": "a step whose gradients are NaN or infinite is left out, not only its loss in the log "
    "(`test_bad_steps.py`)",
    "total_flos, num_parameters, get_num_trainable_parameters": "learned scales are parameters, and are counted",
    "get_learning_rates, optimizer groups": "scales have a group and a rate of their own (`test_optimizer.py`)",
    "gradient_checkpointing, n_gpu > 1, DeepSpeed, FSDP 1, fp16_full_eval": "refused by the constructor, with what to "
    "do instead (`test_checks.py`)",
    "missing and unexpected keys of a checkpoint": "an error, and no warning (`test_saving.py`)",
    "losses after resuming": "Trainer of transformers 5.24 loads a ViT's checkpoint under other names, warns of 16 "
    "missing weights, and goes on from those of the model; ours loads all (`test_resuming.py`, to the last bit)",
    "push_to_hub, create_model_card": "the exported model and its card (`test_pushing.py`, `test_publishing.py`)",
    "hooks that modules inside a captured part get after the constructor": "not called, and warned of: a graph "
    "computes in their place; those of the model and of its parts are called (row below)",
    "group_by_length, neftune_noise_alpha, packing, tokenizers": "of text only: no vision model takes them",
    "liger_kernel, galore, lomo, apollo, bitsandbytes": "kernels and optimizers of packages that are not installed",
}

#: Figures of time, and those of `EXCEPTIONS`.
NOT_COMPARED = ("runtime", "per_second", "qat_", "total_flos")

Row = Callable[[type[Trainer], nn.Module, Path], object]


class QuantizersOff(QATTrainer):
    """Trains and evaluates as the float model, through the graphs of the prepared one."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with fake_quant_disabled(self.model):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with fake_quant_disabled(self.model):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with fake_quant_disabled(self.model):
            return super().predict(*args, **kwargs)


@pytest.fixture(scope="module")
def models() -> dict[type[Trainer], nn.Module]:
    """The float model, and what `prepare_qat` makes of it; its biases are left alone."""
    torch.manual_seed(0)
    model = vit()
    model.set_attn_implementation("eager")
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    return {Trainer: model, QuantizersOff: prepare_qat(copy.deepcopy(model), recipe(bias_correction=False), pixels)}


def trainer_of(kind: type[Trainer], model: nn.Module, directory: Path, **changes: Any) -> Trainer:
    """On 16 images, with 10 to evaluate on; `changes` are Trainer's arguments by keyword, or TrainingArguments'."""
    mine = {name: changes.pop(name) for name in list(changes) if name in OF_TRAINER}
    data = {"train_dataset": images(16), "eval_dataset": images(10, seed=1), "compute_metrics": accuracy, **mine}
    return kind(model, arguments(directory, **changes), **data)


OF_TRAINER = {
    "train_dataset",
    "eval_dataset",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "preprocess_logits_for_metrics",
    "data_collator",
}


def history(trainer: Trainer) -> list[dict[str, float]]:
    """The log, without figures of time."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


def with_arguments(**changes: Any) -> Row:
    """Trains, evaluates, and returns the log."""

    def row(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
        trainer = trainer_of(kind, model, directory, **copy.deepcopy(changes))
        trainer.train()
        trainer.evaluate()
        return trainer.state.global_step, history(trainer)

    return row


def early_stopping(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    trainer = trainer_of(
        kind,
        model,
        directory,
        max_steps=12,
        learning_rate=0.0,  # which improves nothing
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    return trainer.state.global_step, trainer.state.best_metric, Path(trainer.state.best_model_checkpoint or "").name


def best_model(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        kind, model, directory, max_steps=6, learning_rate=5e-2, load_best_model_at_end=True, **changes
    )
    trainer.train()
    return trainer.state.best_global_step, trainer.evaluate()["eval_loss"], history(trainer)


def files(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    found = []
    for changes in ({"save_total_limit": 2}, {"save_only_model": True}, {"save_strategy": "epoch", "max_steps": 4}):
        run = directory / str(len(found))
        trainer_of(kind, model, run, **{"save_strategy": "steps", "save_steps": 1, **changes}).train()
        paths = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
        found.append(sorted(str(path) for path in paths if path.suffix != ".md"))
    return found


def resumed(**changes: Any) -> Row:
    """Begins, and goes on from the second of four steps in a new trainer."""

    def row(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
        saving = {"save_strategy": "steps", "save_steps": 2, **changes}
        trainer_of(kind, copy.deepcopy(model), directory, **saving).train()
        again = trainer_of(kind, model, directory, **saving)
        again.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        kept = ("step", "epoch", "learning_rate")  # of losses, `EXCEPTIONS` tells
        return [{name: entry.get(name) for name in kept} for entry in history(again)], again.state.epoch

    return row


def events(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    seen: list[str] = []

    class Listens(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                seen.append(name)
            return super().__getattribute__(name)

    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(kind, model, directory, callbacks=[Listens()], **changes)
    trainer.train()
    return seen


def stopped(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    trainer = trainer_of(kind, model, directory, callbacks=[Stops])
    trainer.train()
    callback = trainer.pop_callback(Stops)
    trainer.train()
    return type(callback).__name__, trainer.state.global_step


def optimizer_of_ones_own(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    trainer = trainer_of(kind, model, directory, optimizers=(optimizer, scheduler))
    trainer.train()
    return history(trainer)


def predictions(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from images(10, seed=2)

    results = []
    for changes in ({}, {"eval_accumulation_steps": 1}, {"prediction_loss_only": True}):
        trainer = trainer_of(kind, model, directory, **changes)
        if not results:
            trainer.train()
        for data in (images(10, seed=2), Stream()):
            result = trainer.predict(data)
            scores = result.predictions
            metrics = {key: value for key, value in result.metrics.items() if "loss" in key or "accuracy" in key}
            results.append((None if scores is None else scores.round(3).tolist(), metrics))
    return results


def metrics_by_batch(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    right: list[float] = []

    def compute(prediction: Any, compute_result: bool) -> dict[str, float]:
        right.extend((prediction.predictions.argmax(-1) == prediction.label_ids).tolist())
        return {"right": float(sum(right)) / len(right)} if compute_result else {}

    trainer = trainer_of(kind, model, directory, compute_metrics=compute, batch_eval_metrics=True)
    trainer.train()
    return trainer.evaluate()["eval_right"], len(right)


def several_sets(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    sets = {"one": images(10, seed=1), "other": images(6, seed=2)}
    trainer = trainer_of(kind, model, directory, eval_dataset=sets, eval_strategy="epoch")
    trainer.train()
    return history(trainer)


def tokens(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    trainer = trainer_of(kind, model, directory, include_num_input_tokens_seen="all")
    trainer.train()
    return trainer.state.num_input_tokens_seen


def smaller_batches(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    sizes: list[int] = []

    class Small(kind):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            if len(inputs["labels"]) > 7:
                raise RuntimeError("CUDA out of memory.")
            sizes.append(len(inputs["labels"]))
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = trainer_of(Small, model, directory, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.train()
    return trainer.state.train_batch_size, set(sizes), trainer.state.global_step


def set_later(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    """Attributes and hooks that the trainer and the model get after the constructor."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    trainer = kind(model, arguments(directory))
    trainer.train_dataset, trainer.eval_dataset = images(8, seed=3), images(6, seed=4)
    trainer.compute_metrics = accuracy
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {**collate(rows), "pixel_values": collate(rows)["pixel_values"] * 0.5}
    trainer.add_callback(EarlyStoppingCallback)
    trainer.remove_callback(EarlyStoppingCallback)
    model.register_forward_pre_hook(lambda *_: seen.append(("before", ())))
    model.vit.register_forward_hook(lambda module, args, out: seen.append(("part", tuple(out[0].shape))))
    model.classifier.register_full_backward_hook(lambda module, *grads: seen.append(("backward", ())))
    first = len(seen)
    trainer.train()
    steps = [entry for entry in seen[first:] if entry[0] == "backward"]
    return history(trainer), len(steps), {entry for entry in seen if entry[0] != "backward"}, trainer.evaluate().keys()


def plateau(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    changes = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 8}
    options = {"patience": 0, "threshold": 10.0, "factor": 0.5}
    trainer = trainer_of(kind, model, directory, lr_scheduler_kwargs=options, metric_for_best_model="loss", **changes)
    trainer.train()
    return history(trainer)


def search(kind: type[Trainer], model: nn.Module, directory: Path) -> object:
    """Two trials, each with a new model; copies of ours keep their quantizers off."""
    optuna = pytest.importorskip("optuna", reason='optuna is not installed: pip install "hf_qat[search]"')
    objectives: list[float] = []

    def objective(metrics: dict[str, float]) -> float:
        objectives.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    def space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [2, 4]),
        }

    args = arguments(directory, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    data = {"train_dataset": images(16), "eval_dataset": images(10, seed=1), "compute_metrics": accuracy}
    is_float = kind is Trainer
    with nullcontext() if is_float else fake_quant_disabled(model):
        trainer = (kind if is_float else QATTrainer)(args=args, model_init=lambda: copy.deepcopy(model), **data)
        sampler = optuna.samplers.RandomSampler(seed=0)
        best = trainer.hyperparameter_search(space, objective, 2, "minimize", "optuna", sampler=sampler)
    runs = sorted(str(path.relative_to(directory)) for path in directory.glob("*/*"))
    return best.run_id, best.objective, best.hyperparameters, objectives, runs


#: What is tried → how.
ROWS: dict[str, Row] = {
    "gradient_accumulation_steps": with_arguments(gradient_accumulation_steps=2),
    "callbacks: every event, in order": events,
    "optimizers=(optimizer, scheduler)": optimizer_of_ones_own,
    "attributes and hooks set after the constructor": set_later,
    "num_train_epochs, a fraction": with_arguments(max_steps=-1, num_train_epochs=1.5),
    "dataloader_drop_last": with_arguments(
        max_steps=-1, num_train_epochs=1, per_device_train_batch_size=6, dataloader_drop_last=True
    ),
    "a last short batch": with_arguments(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=6),
    "eval_strategy, eval_delay, eval_on_start": with_arguments(
        eval_strategy="steps", eval_steps=1, eval_delay=2, eval_on_start=True
    ),
    "logging_strategy, logging_first_step": with_arguments(logging_strategy="epoch", logging_first_step=True),
    "label_smoothing_factor": with_arguments(label_smoothing_factor=0.1),
    "weight_decay, warmup": with_arguments(weight_decay=0.5, warmup_steps=2, lr_scheduler_type="cosine"),
    "max_grad_norm": with_arguments(max_grad_norm=0.01),
    "seed and data_seed": with_arguments(seed=7, data_seed=3),
    "lr_scheduler_kwargs": with_arguments(
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.5}
    ),
    "lr_scheduler_type, on a plateau": plateau,
    "optim: adafactor": with_arguments(optim="adafactor"),
    "optim: sgd": with_arguments(optim="sgd", learning_rate=0.1),
    "optim: rmsprop": with_arguments(optim="rmsprop"),
    "optim: adamw_torch_fused": with_arguments(optim="adamw_torch_fused", optim_args="eps=1e-6"),
    "optimizer_cls_and_kwargs": with_arguments(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1})),
    "dataloader_num_workers, prefetch_factor": with_arguments(dataloader_num_workers=1, dataloader_prefetch_factor=2),
    "average_tokens_across_devices, torch_empty_cache_steps": with_arguments(
        average_tokens_across_devices=True, torch_empty_cache_steps=1
    ),
    "preprocess_logits_for_metrics": with_arguments(preprocess_logits_for_metrics=lambda scores, labels: scores * 2),
    "early stopping": early_stopping,
    "load_best_model_at_end": best_model,
    "save_total_limit, save_only_model, save_strategy": files,
    "resume: batches that were seen are skipped": resumed(),
    "resume: ignore_data_skip": resumed(ignore_data_skip=True),
    "control.should_training_stop, pop_callback, a second train()": stopped,
    "predict: streams, eval_accumulation_steps, prediction_loss_only": predictions,
    "batch_eval_metrics": metrics_by_batch,
    "several evaluation sets": several_sets,
    "include_num_input_tokens_seen": tokens,
    "auto_find_batch_size": smaller_batches,
    "hyperparameter_search": search,
    "torch_compile, torch_compile_backend": with_arguments(torch_compile=True, torch_compile_backend="aot_eager"),
}

#: The rows that every run of the tests takes; the others are slow together.
SAMPLE = list(ROWS)[:4]


def require_alike(ours: Any, plain: Any) -> None:
    """Numbers to a thousandth, or to 1e-5 where they are that small; all else as it is."""
    if isinstance(plain, dict):
        assert ours.keys() == plain.keys()
        for key, value in plain.items():
            require_alike(ours[key], value)
    elif isinstance(plain, (list, tuple)):
        assert len(ours) == len(plain), (ours, plain)
        for mine, value in zip(ours, plain, strict=True):
            require_alike(mine, value)
    elif isinstance(plain, float):
        assert ours == pytest.approx(plain, rel=1e-3, abs=2e-3)
    else:
        assert ours == plain


@pytest.mark.parametrize("row", [*SAMPLE, *(pytest.param(row, marks=pytest.mark.slow) for row in list(ROWS)[4:])])
def test_with_quantizers_off_ours_does_what_trainer_does(
    models: dict[type[Trainer], nn.Module], tmp_path: Path, row: str
):
    plain, ours = (ROWS[row](kind, copy.deepcopy(model), tmp_path / kind.__name__) for kind, model in models.items())
    require_alike(ours, plain)
