"""The batches of a trainer's data, as its own loaders make them: to capture, calibrate and verify with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_qat.graph.capture.inputs import LABEL_NAMES
from hf_qat.trainer.random_state import random_state_kept


def first_batch(trainer: Trainer) -> dict[str, Any] | None:
    """The first batch of the data, with labels; `None` without data."""
    with random_state_kept(trainer.args.device):
        loader = _any_loader(trainer)
        return None if loader is None else next(iter(loader), None)


def first_inputs(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    """Inputs of the first `count` images or a few more, by batches, on the CPU; all there are if those are fewer."""
    batches: list[dict[str, Any]] = []
    found, loader = 0, _any_loader(trainer)
    if loader is None:
        return batches
    with random_state_kept(trainer.args.device):
        for batch in inputs_of(trainer, loader):
            batches.append(pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), batch))
            found += len(next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)))
            if found >= count:
                break
    return batches


def inputs_of(trainer: Trainer, loader: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches of `loader`, without labels."""
    for batch in loader:
        yield without_labels(trainer, batch)


def without_labels(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what the trainer, or any vision model of transformers, takes for labels."""
    return {name: value for name, value in batch.items() if name not in {*LABEL_NAMES, *trainer.label_names}}


def _any_loader(trainer: Trainer) -> DataLoader[Any] | None:
    """Of the train set; without one, of the evaluation set, or of the first of several."""
    if trainer.train_dataset is not None:
        return trainer.get_train_dataloader()
    if trainer.eval_dataset is None:
        return None
    several = isinstance(trainer.eval_dataset, dict)
    return trainer.get_eval_dataloader(next(iter(trainer.eval_dataset)) if several else None)
