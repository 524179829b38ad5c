"""What the commands have in common: a model with its processor and its images, and a trainer of it all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainingArguments

from hf_qat.cli.arguments import DataArguments, ModelArguments
from hf_qat.cli.images import encoder, load_images
from hf_qat.cli.labels import Labels, labels_for
from hf_qat.cli.tasks import Task, find_task
from hf_qat.cli.tasks.classes import Classes
from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError, listed
from hf_qat.files.atomic import require_replaceable
from hf_qat.model.state import state_of
from hf_qat.trainer.publishing import compiled_in
from hf_qat.trainer.trainer import QATTrainer


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A model, its processor and its data.

    Attributes:
        train, evaluation: as the model takes them; `evaluation` is `None` for images without labels.
    """

    model: Any
    processor: Any
    task: Task
    train: Any
    evaluation: Any
    classes: list[str] = field(default_factory=list)

    def require_trainable(self, config: QATConfig) -> None:
        """Raise `ConfigError` for a checkpoint of integers, or of a training by another recipe than `config`."""
        state, name = state_of(self.model), self.model.name_or_path
        if state is not None and state.stage is Stage.CONVERTED:
            raise ConfigError(f"{name} is quantized already, for inference only: give the float model.")
        if state is not None and state.config.with_checkpoint(None) != config:
            raise ConfigError(
                f"{name} is a checkpoint of a training for {state.config.target} by other options than these. Give "
                "the float model; with --resume_from_checkpoint, an interrupted training goes on."
            )

    def trainer(self, args: TrainingArguments, config: QATConfig) -> QATTrainer:
        """A `QATTrainer` of it all.

        Raises:
            ConfigError: a glob of the recipe matches nothing, or what measures the task is not installed; before the
                output directory is made.
        """
        config.check_globs([path for path, _ in self.model.named_modules() if path])
        return QATTrainer(self.model, qat_config=config, **self.trainer_arguments(args))

    def inputs(self, rows: Iterable[int]) -> dict[str, Any]:
        """A batch of these rows of the train set, without labels."""
        batch = self.task.collate([self.train[row] for row in rows])
        return {name: value for name, value in batch.items() if name != "labels"}

    def trainer_arguments(self, args: TrainingArguments) -> dict[str, Any]:
        """What a Trainer takes beside the model; whether it joins batches of an evaluation is set in `args`.

        Raises:
            ConfigError: what measures the task is not installed.
        """
        if self.task.require is not None:
            self.task.require()
        args.eval_do_concat_batches = self.task.joins_batches
        return {
            "args": args,
            "train_dataset": self.train,
            "eval_dataset": self.evaluation,
            "data_collator": self.task.collate,
            "compute_loss_func": self.task.loss,
            "compute_metrics": partial(self.task.metrics, self.processor),
            "preprocess_logits_for_metrics": self.task.measured_outputs,
            "processing_class": self.processor,
        }


def require_exportable(directory: Path, config: QATConfig) -> None:
    """Raise `ExportError` for a directory that an export cannot take, before the time for one is spent."""
    require_replaceable(directory, compiled_in(config.target))


def training_arguments(output_dir: str, **more: Any) -> TrainingArguments:
    """Arguments of a trainer that is not to train."""
    return TrainingArguments(output_dir, remove_unused_columns=False, report_to=[], **more)


def open_session(
    model: ModelArguments, data: DataArguments, labelled: bool = True, trains: bool = False, learns: bool = True
) -> Session:
    """Load the images, the processor and the model.

    Args:
        model, data: which.
        labelled: whether the images must have labels, and those the model's; else they may be left aside.
        trains: whether the model learns the classes of the images: then a head that does not fit is made anew.
        learns: whether anything, if only ranges, is found from the images; else they are all there to evaluate on,
            where their only split is named so.

    Raises:
        ConfigError: something is missing, or the classes are not the model's; with what to do.
    """
    task = find_task(data.task)
    _require_findable(model)
    processor = load_processor(model)
    images = load_images(data, task, processor, labelled, learns)
    try:
        labels = labels_for(images.classes, label_names(model), trains)
    except ConfigError as error:
        if labelled:
            raise
        logger.warning("%s Without that, the labels of the images are left aside, and nothing is measured.", error)
        images, labels = replace(images, evaluation=None, classes=Classes()), Labels(())
    loaded = load_model(model, task, labels, trains)
    encode = encoder(data, task, processor, images, labels)
    return Session(
        loaded,
        processor,
        task,
        images.train.with_transform(encode),
        None if images.evaluation is None else images.evaluation.with_transform(encode),
        list(images.classes.names),
    )


def _require_findable(model: ModelArguments) -> None:
    """Raise `ConfigError` for a name that can be no model's on the Hub, before the Hub is asked for it."""
    name = model.model_name_or_path
    if not Path(name).is_dir() and (name.count("/") != 1 or Path(name).suffix == ".onnx"):
        raise ConfigError(f"there is no folder {name}, and a name on the Hub has the form user/model.")


def load_processor(model: ModelArguments) -> Any:
    """The image processor of a model.

    Raises:
        ConfigError: it has none, there is no such model, or a library is missing that the processor needs.
    """
    try:
        return transformers.AutoImageProcessor.from_pretrained(model.model_name_or_path, revision=model.revision)
    except ImportError as error:  # transformers before 5.24 has some processors for torchvision alone
        needed = " ".join(str(error).split())
        raise ConfigError(f"the image processor of {model.model_name_or_path} cannot be loaded: {needed}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no image processor in {model.model_name_or_path}: {_first_line(error)} Save the one that the model was "
            "trained with beside it: processor.save_pretrained(folder)."
        ) from error


def label_names(model: ModelArguments) -> list[str]:
    """The names of a model's labels, in their order.

    Raises:
        ConfigError: there is no such model.
    """
    with _loading(model):
        config = transformers.AutoConfig.from_pretrained(model.model_name_or_path, revision=model.revision)
    names = config.id2label or {}
    return [str(names.get(number, f"LABEL_{number}")) for number in range(len(names))]


def load_model(model: ModelArguments, task: Task, labels: Labels | None = None, trains: bool = False) -> Any:
    """The model, in its task's class.

    Args:
        model: which.
        task: what it is to do.
        labels: for the images; it keeps its own if left out.
        trains: whether it will be trained, so that what its checkpoint lacks may start from random weights.

    Raises:
        ConfigError: there is none, it is of another task, or its checkpoint lacks weights and none will be learned.
    """
    _require_findable(model)
    options: dict[str, Any] = {}
    if labels is not None and labels.names is not None:
        numbered = dict(enumerate(labels.names))
        options = {
            "id2label": numbered,
            "label2id": {name: number for number, name in numbered.items()},
            "ignore_mismatched_sizes": labels.new_head,
        }
    with _loading(model):
        loaded, found = getattr(transformers, task.auto_class).from_pretrained(
            model.model_name_or_path, revision=model.revision, output_loading_info=True, **options
        )
    missing = sorted(found["missing_keys"])
    if missing and not trains:
        raise ConfigError(
            f"{model.model_name_or_path} lacks weights of {type(loaded).__name__}, which would be random numbers: "
            f"{listed(missing)}. Give a model that was trained for this --task."
        )
    return loaded


def load_saved(model: ModelArguments, task: Task | None) -> Any:
    """A converted model, in its task's class, or if that is left out in the class that it was saved from.

    Raises:
        ConfigError: there is none, it is of another task, or it is not converted.
    """
    loaded = _load_as_saved(model) if task is None else load_model(model, task)
    state = state_of(loaded)
    if state is None or state.stage is not Stage.CONVERTED:
        what = "a float model" if state is None else "a checkpoint to train on from"
        raise ConfigError(
            f"{model.model_name_or_path} is {what}, and only an int8 checkpoint can be exported: `hf-qat calibrate` "
            "or `hf-qat train` make one, and export it."
        )
    return loaded


def _load_as_saved(model: ModelArguments) -> Any:
    """The model, in the class that it was saved from."""
    _require_findable(model)
    with _loading(model):
        config = transformers.AutoConfig.from_pretrained(model.model_name_or_path, revision=model.revision)
        class_name = next(iter(config.architectures or ()), "AutoModel")
        saved_from = getattr(transformers, class_name, transformers.AutoModel)
        return saved_from.from_pretrained(model.model_name_or_path, revision=model.revision)


@contextmanager
def _loading(model: ModelArguments) -> Iterator[None]:
    """What goes wrong inside becomes a line that names the model."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = "it is a model of another --task than this. " + reason
        raise ConfigError(f"cannot load {model.model_name_or_path}: {reason}") from error


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."
