"""The batches of a trainer's data, as its model gets them in training: to capture, calibrate and verify with.

A user's own loader, `_prepare_inputs`, `training_step` or `compute_loss` may change them on the way, so each goes that
way, as far as the model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from operator import eq
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Subset
from transformers import Trainer
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_qat.errors import CalibrationError
from hf_qat.graph.capture.inputs import LABEL_NAMES, Inputs
from hf_qat.graph.capture.modes import modes_kept
from hf_qat.graph.captured import captured_modules
from hf_qat.graph.random_state import random_state_kept
from hf_qat.quantization.collectives import min_over_ranks


logger = logging.get_logger(__name__)

#: How many batches of the train set are looked at for images of another size.
BATCHES_LOOKED_AT = 8

#: How many items of each data set, from all over it, are looked at for the same.
ITEMS_LOOKED_AT = 8

#: Dimensions of a batch of images.
IMAGES_DIM = 4

#: What Trainer keeps when it makes a loader: the columns that it passes on, and with `dataloader_persistent_workers`
#: the loaders of evaluation. After a mere look, data sets, collators and names of labels may still change.
KEPT_OF_LOADERS = ("_signature_columns", "_eval_dataloaders")


@contextmanager
def unnoticed(trainer: Trainer) -> Iterator[None]:
    """Inside, data may be looked at: random numbers, and what Trainer keeps of loaders, are as before afterwards."""
    before = {name: copy.copy(value) for name, value in vars(trainer).items() if name in KEPT_OF_LOADERS}
    try:
        with random_state_kept(trainer.args.device):
            yield
    finally:
        for name in KEPT_OF_LOADERS:
            vars(trainer).pop(name, None)
        vars(trainer).update(before)


def first_batch(trainer: Trainer, otherwise: Iterable[Any] | None = None) -> Any:
    """The first batch of the data, or without any of the loader `otherwise`, with labels; `None` without either.

    A dictionary, but for a user's own collator and `compute_loss` that agree on something else.

    Raises:
        CalibrationError: a transform of the data set reads a column that Trainer has left out.
    """
    with unnoticed(trainer):
        loader: Iterable[Any] | None = _any_loader(trainer)
        loader = otherwise if loader is None else loader  # the truth of a loader asks for its length
        try:
            return None if loader is None else next(iter(loader), None)
        except KeyError as error:
            if not _is_of_a_column_left_out(trainer, error):
                raise
            raise CalibrationError(
                f"the data set reads its column {error.args[0]!r}, which Trainer leaves out, as forward has no "
                "argument of that name: set remove_unused_columns=False in the TrainingArguments."
            ) from error


def _is_of_a_column_left_out(trainer: Trainer, error: KeyError) -> bool:
    evaluated = trainer.eval_dataset
    sets = (trainer.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else (evaluated,)))
    columns = chain.from_iterable(getattr(dataset, "column_names", None) or () for dataset in sets)
    return trainer.args.remove_unused_columns and error.args[:1] in [(column,) for column in columns]


def batches_of_another_size(trainer: Trainer, batch: Any) -> list[dict[str, Any]]:
    """Batches whose images have another size than those of `batch`, of those looked at; the best one first.

    What differs between two examples is free in the model, so the best one has another height and another width; it
    is made of one that has not where there is none. Streams are not read for that: some can be read but once.
    """
    sets = [trainer.train_dataset, trainer.eval_dataset]
    if any(isinstance(dataset, dict) or not has_length(dataset) for dataset in sets if dataset is not None):
        return []
    differing: list[dict[str, Any]] = []
    with unnoticed(trainer):
        train = iter(()) if sets[0] is None else islice(trainer.get_train_dataloader(), BATCHES_LOOKED_AT)
        evaluation = iter(()) if sets[1] is None else islice(trainer.get_eval_dataloader(), 1)
        other: Any
        spread = (one for dataset in sets if dataset is not None for one in _spread(trainer, dataset))
        for other in chain(train, evaluation, spread):
            if isinstance(other, Mapping) and _sizes(other) != _sizes(batch):
                if _differs_in_both(other, batch):
                    return [dict(other)]
                differing.append(dict(other))
    return [made_to_differ_in_both(differing[0], batch), differing[0]] if differing else []


def _spread(trainer: Trainer, dataset: Any) -> Iterator[Any]:
    """Batches of one item each, from all over a data set: a collection may begin with many images of one size.

    None where items cannot be read one by one, or the loaders of a trainer that makes its own take them otherwise.
    """
    places = dict.fromkeys(k * len(dataset) // ITEMS_LOOKED_AT for k in range(ITEMS_LOOKED_AT))
    try:
        items = Subset(dataset, list(places))
        collate = trainer.get_test_dataloader(items).collate_fn
        for k in range(len(items)):
            yield collate([items[k]])
    except Exception as error:
        logger.debug(f"Items of the data set are not looked at one by one: {error!r}")


def _differs_in_both(other: Mapping[str, Any], batch: Mapping[str, Any]) -> bool:
    ours, theirs = _sizes(batch), _sizes(other)
    return all(name in theirs and not any(map(eq, size, theirs[name])) for name, size in ours.items())


def made_to_differ_in_both(other: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """`other` cut or padded to a height and a width that are both not those of `batch`, its masks alike."""
    made, theirs = dict(other), _sizes(other)
    for name, (height, width) in _sizes(batch).items():
        if name not in theirs:
            continue
        tall, wide = old = theirs[name]
        # Sizes that occur among the images are sizes that the model takes.
        tall = min({width, wide} - {height}) if tall == height and wide != width else tall
        wide = min({height, old[0]} - {width}) if wide == width and old[0] != height else wide
        for key, value in made.items():
            if isinstance(value, Tensor) and value.shape[-2:] == old:
                made[key] = nn.functional.pad(value, (0, wide - old[1], 0, tall - old[0]))
    return made


def _sizes(batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → height and width of images, (N, C, H, W)."""
    return {
        name: tuple(value.shape[2:])
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == IMAGES_DIM
    }


def first_inputs(trainer: Trainer, model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Inputs of the first `count` images or a few more, by batches, on the CPU; all there are if those are fewer."""
    batches: list[dict[str, Any]] = []
    found = 0
    with unnoticed(trainer):
        loader = _any_loader(trainer)
        for batch in () if loader is None else loader:
            inputs = without_labels(trainer, received(trainer, model, batch))
            batches.append(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), inputs))
            found += next((len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), 1)
            if found >= count:
                break
    return batches


def of_first_size(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose images have the height and width of the first one's: an exported file takes no others."""
    kept = [batch for batch in batches if _sizes(batch) == _sizes(batches[0])]
    if len(kept) < len(batches):
        logger.warning(
            f"The images have several sizes, and the exported file takes those of {_sizes(batches[0])} alone. For "
            "another size, write one more: export_onnx(trainer.convert(), path, images_of_that_size)."
        )
    return kept


def evaluates_other_sizes(trainer: Trainer, model: nn.Module, like: Mapping[str, Any]) -> bool:
    """Whether `model` takes images of any size, and evaluation in any process has others than those of `like`."""
    shapes = [shape for part in captured_modules(model).values() for shape in part.shapes if len(shape) == IMAGES_DIM]
    if all(shape[-1] is not None for shape in shapes):
        return False
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else [None]
    with unnoticed(trainer):
        batches = chain.from_iterable(trainer.get_eval_dataloader(name) for name in names)
        seen = (batch if isinstance(batch, Mapping) else received(trainer, model, batch) for batch in batches)
        alike = all(_sizes(inputs) == _sizes(like) for inputs in seen)
    return not min_over_ranks(int(alike))


def inputs_of(trainer: Trainer, model: nn.Module, loader: Iterable[Any]) -> Iterator[Inputs]:
    """What a training step gives the trainer's model for each batch of `loader`, without labels.

    By position, labels included, where forward cannot do without them.
    """
    for batch in loader:
        given = received(trainer, model, batch)
        required = required_labels(model, label_names(trainer) & given.keys())
        yield in_order(model, given) if required else without_labels(trainer, given)


def without_labels(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what the trainer, or any vision model of transformers, takes for labels."""
    names = label_names(trainer)
    return {name: value for name, value in batch.items() if name not in names}


def label_names(trainer: Trainer) -> set[str]:
    """Names of labels: those of the trainer, and those of all vision models of transformers."""
    return {*LABEL_NAMES, *(trainer.label_names or ())}


def required_labels(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the names that forward has no default for."""
    parameters = inspect.signature(model.forward).parameters
    return {name for name in names if name in parameters and parameters[name].default is inspect.Parameter.empty}


def in_order(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Inputs by position, where nothing is taken for a label: as many as there are without a gap."""
    values = []
    for name in inspect.signature(model.forward).parameters:
        if name not in inputs:
            break
        values.append(inputs[name])
    return tuple(values)


class _Stop(BaseException):
    """Ends a training step when the model is called; no `except Exception` of a user's stands in its way."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs


def received(trainer: Trainer, model: nn.Module, batch: Any) -> dict[str, Any]:
    """What the model is called with in a training step on `batch`, which ends there and logs nothing.

    Raises:
        CalibrationError: the step does not call the model.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(model.forward).parameters
        raise _Stop(dict(chain(zip(names, args, strict=False), kwargs.items())))

    stopping = model.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with stopping, modes_kept(model), silent(trainer):
            trainer.training_step(model, dict(batch) if isinstance(batch, Mapping) else batch)
    except _Stop as stopped:
        return stopped.inputs
    model.zero_grad()
    raise CalibrationError(
        f"training_step of {type(trainer).__name__} never calls the model, so nobody knows what the model gets: call "
        "model(...), not model.forward(...) or a part of it."
    )


def silent(trainer: Trainer) -> AbstractContextManager[None]:
    """Inside, what hooks of the user's own log is not heard of: they run on the side."""
    return method_replaced(trainer, "log", lambda *args, **kwargs: None)


@contextmanager
def method_replaced(trainer: Trainer, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, this trainer has another method; one that a user gave to it alone is there again afterwards."""
    own = {name: vars(trainer)[name]} if name in vars(trainer) else {}
    vars(trainer)[name] = function
    try:
        yield
    finally:
        del vars(trainer)[name]
        vars(trainer).update(own)


def is_overridden(trainer: Trainer, name: str, base: type[Trainer]) -> bool:
    """Whether a method is another one than that of `base`: by a subclass, or given to this trainer alone."""
    return name in vars(trainer) or getattr(type(trainer), name) is not getattr(base, name)


def has_train_data(trainer: Trainer) -> bool:
    """Whether there is a train set, or the user makes the loader of the training."""
    return trainer.train_dataset is not None or is_overridden(trainer, "get_train_dataloader", Trainer)


def _any_loader(trainer: Trainer) -> DataLoader[Any] | None:
    """Of the train set; without one, of the evaluation set, or of the first of several."""
    if has_train_data(trainer):
        return trainer.get_train_dataloader()
    if trainer.eval_dataset is None:
        return None
    several = isinstance(trainer.eval_dataset, dict)
    return trainer.get_eval_dataloader(next(iter(trainer.eval_dataset)) if several else None)
