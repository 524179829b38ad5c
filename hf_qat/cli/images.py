"""The images of a command: a folder, a JSONL file or a data set on the Hub, as train and evaluation sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_qat.cli.arguments import DataArguments
from hf_qat.cli.labels import Labels
from hf_qat.cli.tasks import Task
from hf_qat.cli.tasks.classes import Classes
from hf_qat.errors import ConfigError
from hf_qat.tidl.templates.infer import eight_bits


#: Names that splits to evaluate on have, the better one first.
EVALUATION = ("validation", "test", "val", "dev")


@dataclass(frozen=True)
class Images:
    """The data of a command.

    Attributes:
        train, evaluation: rows with an image; `evaluation` is `None` where there is nothing to evaluate by.
        classes: of both; none for images without labels, and for a task without classes.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    classes: Classes


def load_images(options: DataArguments, task: Task, processor: Any, labelled: bool = True) -> Images:
    """Read the images, and split them if need be.

    Args:
        options: where they are.
        task: what is asked of them.
        processor: of the model, which may mean other labels than the images have.
        labelled: whether labels are needed.

    Raises:
        ConfigError: nothing there, or a column is missing; with what there is.
    """
    if not 0.0 < options.train_val_split < 1.0:
        raise ConfigError(f"train_val_split must lie between 0 and 1, not {options.train_val_split}.")
    for option in ("max_train_samples", "max_eval_samples"):
        number = getattr(options, option)
        if number is not None and number < 1:
            raise ConfigError(f"{option} must be 1 or more, not {number}: of no image, nothing can be said.")
    column = options.label_column_name or task.label_column
    splits = _load(options, [options.image_column_name, *([column] if task.labels_are_images else [])])
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    _require_column(train, options.image_column_name, "image_column_name", options)
    if column not in train.column_names and not labelled:
        return Images(_first(train, options.max_train_samples), None, Classes())
    _require_column(train, column, "label_column_name", options)
    name = next((name for name in EVALUATION if name in splits and splits[name] is not train), None)
    if name is not None:
        evaluation = splits[name]
        _require_column(evaluation, column, "label_column_name", options)
    else:
        # The part to evaluate on is rounded up.
        if math.ceil(len(train) * options.train_val_split) >= len(train):
            raise ConfigError(
                f"{options.dataset_name} has {len(train)} images, too few for a train_val_split of "
                f"{options.train_val_split}: none are left to train on."
            )
        parts = train.train_test_split(options.train_val_split, seed=0)
        train, evaluation = parts["train"], parts["test"]
    both = datasets.concatenate_datasets([part.select_columns([column]) for part in (train, evaluation)])
    classes = task.classes(processor, both, column)
    return Images(_first(train, options.max_train_samples), _first(evaluation, options.max_eval_samples), classes)


def _load(options: DataArguments, pictures: Sequence[str]) -> datasets.DatasetDict:
    """All splits; `pictures` are the columns where a JSONL file has paths, as far as it has them."""
    path = Path(options.dataset_name)
    if path.is_dir():
        if not any(path.iterdir()):
            raise ConfigError(f"{path} is empty: it is to hold images, one folder for each class.")
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    if path.is_file():
        return _from_jsonl(path, options.image_column_name, pictures)
    if options.dataset_name.count("/") > 1 or path.suffix:
        raise ConfigError(f"there is no folder and no file {options.dataset_name}.")
    return datasets.load_dataset(options.dataset_name, options.dataset_config_name)


def _from_jsonl(path: Path, column: str, pictures: Sequence[str]) -> datasets.DatasetDict:
    try:
        splits = datasets.load_dataset("json", data_files=str(path))
    except (datasets.exceptions.DatasetGenerationError, StopIteration) as error:
        reason = " ".join(str(error.__cause__ or "it is empty").split())
        raise ConfigError(f"{path} holds no JSON object in each line: {reason}") from error
    if column not in splits["train"].column_names:
        raise ConfigError(f"{path} has no {column!r} in its lines: each is to name an image, relative to the file.")
    named = [name for name in pictures if name in splits["train"].column_names]

    def absolute(row: dict[str, Any], number: int) -> dict[str, Any]:
        wrong = next((name for name in named if not isinstance(row[name], str)), None)
        if wrong is not None:
            raise ConfigError(f"{path}, line {number + 1}: {wrong!r} is {row[wrong]!r}, and is to be a path.")
        return {name: str(path.parent / row[name]) for name in named}

    splits = splits.map(absolute, with_indices=True)
    for name in named:
        splits = splits.cast_column(name, datasets.Image())
    return splits


def _require_column(dataset: datasets.Dataset, column: str, option: str, options: DataArguments) -> None:
    if column not in dataset.column_names:
        raise ConfigError(
            f"{options.dataset_name} has no column {column!r}; it has {', '.join(dataset.column_names)}. Name the "
            f"right one by --{option}."
        )


def _first(dataset: datasets.Dataset, samples: int | None) -> datasets.Dataset:
    return dataset if samples is None else dataset.shuffle(seed=0).select(range(min(samples, len(dataset))))


def encoder(
    options: DataArguments, task: Task, processor: Any, images: Images, labels: Labels
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """For `Dataset.with_transform`: rows as the model takes them; labels only where there is something to evaluate."""
    column = options.label_column_name or task.label_column
    labelled = images.evaluation is not None

    def number_of(value: object) -> int:
        return labels.numbers[images.classes.number_of(value)]

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [in_colour(image) for image in rows[options.image_column_name]]
        learned = rows[column] if labelled else []
        if task.renumbered is not None:
            learned = [task.renumbered(each, number_of) for each in learned]
        return task.encode(processor, pictures, learned)

    return encode


def in_colour(image: Image.Image) -> Image.Image:
    """A picture as models take it: RGB, 8 bits each. Of 16 bits the upper 8 are taken.

    Raises:
        ConfigError: its values are floating-point numbers, of which nobody knows what is white.
    """
    if image.mode == "F":
        raise ConfigError("an image holds floating-point numbers: save it with 8 or 16 bits.")
    rgb: Image.Image = eight_bits(image).convert("RGB")
    return rgb
