"""The batches of a trainer's data, as its model gets them in training: to capture, calibrate and verify with.

A user's own loader, `_prepare_inputs`, `training_step` or `compute_loss` may change them on the way, so each goes that
way, as far as the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.utils import logging

from hf_qat.errors import CalibrationError
from hf_qat.graph.capture.inputs import LABEL_NAMES
from hf_qat.graph.capture.modes import modes_kept
from hf_qat.trainer.random_state import random_state_kept


logger = logging.get_logger(__name__)


def first_batch(trainer: Trainer) -> dict[str, Any] | None:
    """The first batch of the data, with labels; `None` without data."""
    with random_state_kept(trainer.args.device):
        loader = _any_loader(trainer)
        return None if loader is None else next(iter(loader), None)


def first_inputs(trainer: Trainer, model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Inputs of the first `count` images or a few more, by batches, on the CPU; all there are if those are fewer."""
    batches: list[dict[str, Any]] = []
    found, loader = 0, _any_loader(trainer)
    if loader is None:
        return batches
    with random_state_kept(trainer.args.device):
        for batch in inputs_of(trainer, model, loader):
            batches.append(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), batch))
            found += len(next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)))
            if found >= count:
                break
    return batches


def inputs_of(trainer: Trainer, model: nn.Module, loader: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What a training step gives the trainer's model for each batch of `loader`, without labels."""
    for batch in loader:
        yield without_labels(trainer, _received(trainer, model, batch))


def example_inputs(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a training step gives `model` for a batch, with labels; where the step cannot run yet, the batch itself.

    A subclass of the user's may have attributes that its constructor sets after that of the trainer.
    """
    try:
        return _received(trainer, model, batch)
    except Exception as error:
        logger.warning(f"The first batch is captured as the data has it, as training_step cannot run yet: {error}")
        return dict(batch)


def without_labels(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what the trainer, or any vision model of transformers, takes for labels."""
    return {name: value for name, value in batch.items() if name not in {*LABEL_NAMES, *trainer.label_names}}


class _Stop(BaseException):
    """Ends a training step when the model is called; no `except Exception` of a user's stands in its way."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs


def _received(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with in a training step on `batch`, which ends there."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(model.forward).parameters
        raise _Stop(dict(chain(zip(names, args, strict=False), kwargs.items())))

    handle = model.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        with modes_kept(model):
            trainer.training_step(model, dict(batch))
    except _Stop as stopped:
        return stopped.inputs
    finally:
        handle.remove()
    model.zero_grad()
    raise CalibrationError(
        f"training_step of {type(trainer).__name__} never calls the model, so nobody knows what the model gets: call "
        "model(...), not model.forward(...) or a part of it."
    )


def _any_loader(trainer: Trainer) -> DataLoader[Any] | None:
    """Of the train set; without one, of the evaluation set, or of the first of several."""
    if trainer.train_dataset is not None:
        return trainer.get_train_dataloader()
    if trainer.eval_dataset is None:
        return None
    several = isinstance(trainer.eval_dataset, dict)
    return trainer.get_eval_dataloader(next(iter(trainer.eval_dataset)) if several else None)
