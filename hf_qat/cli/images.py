"""The images of a command: a folder, a JSONL file or a data set on the Hub, as train and evaluation sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_qat.cli import pictures
from hf_qat.cli.arguments import DataArguments
from hf_qat.cli.labels import Labels
from hf_qat.cli.tasks import Task
from hf_qat.cli.tasks.classes import Classes
from hf_qat.errors import ConfigError


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


def load_images(
    options: DataArguments, task: Task, processor: Any, labelled: bool = True, learns: bool = True
) -> Images:
    """Read the images, and split them if need be.

    Args:
        options: where they are.
        task: what is asked of them.
        processor: of the model, which may mean other labels than the images have.
        labelled: whether labels are needed.
        learns: whether some are to learn from; else a split to evaluate on that stands alone is not split.

    Raises:
        ConfigError: nothing there, or a column is missing; with what there is. A file is missing or no picture.
    """
    _check(options)
    column = options.label_column_name or task.label_column
    pictured = [options.image_column_name, *([column] if task.labels_are_images else [])]
    splits = _load(options, pictured)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    _require_pictures(train, options.image_column_name, "image_column_name", options)
    known = train.features.get(column)
    if not labelled and (known is None or (task.labels_are_images and not isinstance(known, datasets.Image))):
        return Images(_first(train, options.max_train_samples, pictured[:1]), None, Classes())
    alone = len(splits) == 1 and next(iter(splits)) in EVALUATION
    train, evaluation = (train, train) if alone and not learns else _parts(splits, train, options)
    parts = [train] if evaluation is train else [train, evaluation]
    for part in parts:
        require = _require_pictures if task.labels_are_images else _require_column
        require(part, column, "label_column_name", options)
    labels = [_undecoded(part.select_columns([column]), pictured) for part in parts]
    classes = task.classes(processor, datasets.concatenate_datasets(labels), column)
    return Images(
        _first(train, options.max_train_samples, pictured),
        _first(evaluation, options.max_eval_samples, pictured),
        classes,
    )


def _check(options: DataArguments) -> None:
    """Raise `ConfigError` for numbers that leave no image."""
    if not 0.0 < options.train_val_split < 1.0:
        raise ConfigError(f"train_val_split must lie between 0 and 1, not {options.train_val_split}.")
    for option in ("max_train_samples", "max_eval_samples"):
        number = getattr(options, option)
        if number is not None and number < 1:
            raise ConfigError(f"{option} must be 1 or more, not {number}: of no image, nothing can be said.")


def _parts(
    splits: datasets.DatasetDict, train: datasets.Dataset, options: DataArguments
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What to train on and what to evaluate on: two splits, or two parts of the one there is."""
    name = next((name for name in EVALUATION if name in splits and splits[name] is not train), None)
    if name is not None:
        return train, splits[name]
    # The part to evaluate on is rounded up.
    if math.ceil(len(train) * options.train_val_split) >= len(train):
        raise ConfigError(
            f"{options.dataset_name} has {len(train)} images, too few for a train_val_split of "
            f"{options.train_val_split}: none are left to train on."
        )
    parts = train.train_test_split(options.train_val_split, seed=0)
    return parts["train"], parts["test"]


def _load(options: DataArguments, pictured: Sequence[str]) -> datasets.DatasetDict:
    """All splits; `pictured` are the columns where a JSONL file has paths, as far as it has them."""
    path = Path(options.dataset_name)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_jsonl(path, options.image_column_name, pictured)
    if options.dataset_name.count("/") > 1 or path.suffix:
        raise ConfigError(f"there is no folder and no file {options.dataset_name}.")
    try:
        return datasets.load_dataset(options.dataset_name, options.dataset_config_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"there is no folder {path}, and no data set on the Hub could be read: {reason}") from error


def _from_folder(path: Path) -> datasets.DatasetDict:
    if not any(path.iterdir()):
        raise ConfigError(f"{path} is empty: it is to hold images, one folder for each class.")
    try:
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"{path} cannot be read as a folder of images, one folder for each class or with metadata.jsonl: {reason}"
        ) from error


def _from_jsonl(path: Path, column: str, pictured: Sequence[str]) -> datasets.DatasetDict:
    try:
        splits = datasets.load_dataset("json", data_files=str(path))
    except (datasets.exceptions.DatasetGenerationError, StopIteration) as error:
        reason = " ".join(str(error.__cause__ or "it is empty").split())
        raise ConfigError(f"{path} holds no JSON object in each line: {reason}") from error
    if column not in splits["train"].column_names:
        raise ConfigError(f"{path} has no {column!r} in its lines: each is to name an image, relative to the file.")
    named = [name for name in pictured if name in splits["train"].column_names]

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
    if column in dataset.column_names:
        return
    if dataset.column_names == [options.image_column_name] and Path(options.dataset_name).is_dir():
        raise ConfigError(
            f"{options.dataset_name} says nothing of its images: give a folder with one folder for each class, two of "
            f"them at least; or write a metadata.jsonl into it, with {column!r} in each line."
        )
    raise ConfigError(
        f"{options.dataset_name} has no column {column!r}; it has {', '.join(dataset.column_names)}. Name the "
        f"right one by --{option}."
    )


def _require_pictures(dataset: datasets.Dataset, column: str, option: str, options: DataArguments) -> None:
    _require_column(dataset, column, option, options)
    if not isinstance(dataset.features[column], datasets.Image):
        raise ConfigError(
            f"the column {column!r} of {options.dataset_name} holds no pictures. Name the right one by --{option}; a "
            "JSONL file has their paths there."
        )


def _first(dataset: datasets.Dataset, samples: int | None, pictured: Sequence[str]) -> datasets.Dataset:
    """So many rows, or all, with their pictures as they lie in their files, each of which can be read."""
    if samples is not None:
        dataset = dataset.shuffle(seed=0).select(range(min(samples, len(dataset))))
    dataset = _undecoded(dataset, pictured)
    for column in pictured:
        pictures.require_readable(dataset, column)
    return dataset


def _undecoded(dataset: datasets.Dataset, pictured: Sequence[str]) -> datasets.Dataset:
    """The same with pictures as they lie in their files: where one cannot be read, its name can be said."""
    for column in pictured:
        if column in dataset.column_names:
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def encoder(
    options: DataArguments, task: Task, processor: Any, images: Images, labels: Labels
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """For `Dataset.with_transform`: rows as the model takes them; labels only where there is something to evaluate."""
    column = options.label_column_name or task.label_column
    labelled = images.evaluation is not None

    def number_of(value: object) -> int:
        return labels.numbers[images.classes.number_of(value)]

    def learned(label: Any, image: Image.Image) -> Any:
        known = pictures.read(label) if task.labels_are_images else label
        if task.check is not None:
            task.check(image, known)
        return known if task.renumbered is None else task.renumbered(known, number_of)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        shown, wanted = [], []
        for position, value in enumerate(rows[options.image_column_name]):
            image = pictures.read(value)
            with pictures.naming(value):
                shown.append(pictures.in_colour(image))
                if labelled:
                    wanted.append(learned(rows[column][position], image))
        return task.encode(processor, shown, wanted)

    return encode
