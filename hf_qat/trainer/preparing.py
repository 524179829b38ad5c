"""When and with what a trainer's model is prepared: in the constructor if it can be, else at its first use.

It has to wait where there are no data yet, and where a subclass of the user's sets attributes after the constructor of
the trainer that its hooks need.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hf_qat.config.checkpoint_info import Stage
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import CalibrationError, CaptureError
from hf_qat.graph.capture.inputs import Inputs
from hf_qat.graph.random_state import random_state_kept
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.state import require_stage, state_of
from hf_qat.trainer import distributed
from hf_qat.trainer.batches import (
    batches_of_another_size,
    first_batch,
    has_train_data,
    in_order,
    label_names,
    received,
    required_labels,
    without_labels,
)
from hf_qat.trainer.distillation import Distillation


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Examples:
    """The first batch, on its way to the model.

    Attributes:
        batch: as the data have it, with labels; a dictionary, unless collator and loss are the user's own.
        inputs: what the model gets, without labels but for those that its forward cannot do without.
        labels: what else it gets.
        other_sizes: inputs with images of another size, if the data have such; the best ones first.
    """

    batch: Any
    inputs: Inputs
    labels: Mapping[str, Any]
    other_sizes: Sequence[Inputs] = ()


def examples(trainer: Trainer, model: nn.Module, loader: Iterable[Any] | None) -> Examples | None:
    """The first batch of the trainer's data, or without any of `loader`; `None` without either."""
    batch = first_batch(trainer, loader)
    if batch is None:
        return None
    try:
        return _examples(trainer, model, batch, received(trainer, model, batch))
    except Exception as error:
        if not isinstance(batch, Mapping):  # only the hooks know what of it the model gets
            raise
        logger.warning(
            f"training_step or compute_loss fails before the first step ({error}): the first batch is captured as the "
            "data have it."
        )
        return _examples(trainer, model, batch, batch)


def can_wait(trainer: Trainer, model: nn.Module) -> bool:
    """Whether preparing a float model can wait for data: its config does not say the size of images."""
    has_size = getattr(getattr(model, "config", None), "image_size", None) is not None
    has_data = has_train_data(trainer) or trainer.eval_dataset is not None
    return state_of(model) is None and (has_data or not has_size)


def examples_if_ready(trainer: Trainer, model: nn.Module, own_hooks: bool) -> Examples | None:
    """`examples`, or `None` where there are no data, or hooks of the user's own cannot run yet."""
    try:
        batch = first_batch(trainer)
        return None if batch is None else _examples(trainer, model, batch, received(trainer, model, batch))
    except Exception as error:
        if not own_hooks:
            raise
        logger.info(f"The model is prepared when it is first used, as the trainer's hooks cannot run yet: {error!r}")
        return None


def _examples(trainer: Trainer, model: nn.Module, batch: Any, given: Mapping[str, Any]) -> Examples:
    names = label_names(trainer)
    required = required_labels(model, names & given.keys())
    labels = {name: value for name, value in given.items() if name in names and name not in required}
    inputs = {name: value for name, value in given.items() if name not in labels}
    _require_tensors(model, inputs)
    if required:
        return Examples(batch, in_order(model, inputs), labels)
    others = [] if state_of(model) is not None else batches_of_another_size(trainer, batch)
    other_sizes = [without_labels(trainer, received(trainer, model, other)) for other in others]
    return Examples(batch, inputs, labels, other_sizes)


def _require_tensors(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise `CalibrationError` for a batch that has nothing for the model but labels."""
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(dict(inputs))):
        wanted = ", ".join(inspect.signature(model.forward).parameters)
        raise CalibrationError(
            f"the first batch has nothing for {type(model).__name__} but labels; forward takes {wanted}. Columns of "
            "other names are left out by Trainer: give the images that name in the data set, or by data_collator= and "
            "remove_unused_columns=False."
        )


def prepare(
    trainer: Trainer, config: QATConfig | None, teacher: nn.Module | str | None, found: Examples | None
) -> Distillation | None:
    """Prepare the trainer's model in place, if it is not yet, and set up what its teacher teaches.

    The model is the same in all processes. No random number of the training's is drawn.
    """
    model = trainer.model
    assert model is not None
    distributed.synchronize_initial_model(trainer, model)
    teacher = _teacher_model(teacher, model)
    if state_of(model) is None:
        with random_state_kept(trainer.args.device):
            _prepare(model, config, found)
    if teacher is None:
        return None
    temperature = require_stage(model, Stage.PREPARED, "train").config.distillation_temperature
    distillation = Distillation(teacher, temperature, trainer.args.device)
    if found is not None:
        distillation.check(model, found.inputs)
    return distillation


def _teacher_model(teacher: nn.Module | str | None, model: nn.Module) -> nn.Module | None:
    """The teacher itself: a copy of a float model that is about to be prepared, or one that is read."""
    if teacher == "float":
        return copy.deepcopy(model)
    if isinstance(teacher, str):
        assert isinstance(model, PreTrainedModel)  # `check_teacher` has seen to it
        return type(model).from_pretrained(teacher)
    return teacher


def _prepare(model: nn.Module, config: QATConfig | None, found: Examples | None) -> None:
    """For images of any size, where the data have several and the model can; else for those of the first batch."""
    if found is None:
        prepare_qat(model, config)
        return
    refusals = []
    for other_size in found.other_sizes:
        try:
            prepare_qat(model, config, found.inputs, found.labels, other_size)
            return
        except CaptureError as error:
            refusals.append(error)
    if refusals:
        logger.warning(
            f"The images have several sizes, and the model takes those of the first batch only: {refusals[-1]}"
        )
    prepare_qat(model, config, found.inputs, found.labels)


def data_to_calibrate_on(trainer: Trainer, evaluated: DataLoader[Any]) -> Dataset[Any] | None:
    """What a model that is about to be run on `evaluated` is calibrated on: `None` for the train set, if there is."""
    dataset = None if has_train_data(trainer) else evaluated.dataset
    source = "the train set" if dataset is None else "the data that it is to be run on: there is no train set"
    logger.warning(f"The model has no ranges yet and is calibrated first, on {source}.")
    return dataset
