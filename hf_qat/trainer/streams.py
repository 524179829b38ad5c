"""A train set that can be read but once: what is looked at before training is kept, and comes first in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_qat.graph.random_state import random_state_kept


logger = logging.get_logger(__name__)


class ReadOnce(IterableDataset[Any]):
    """A stream that is read once: every look begins with the same samples, and so does the first epoch of training.

    All else is that of the stream: its attributes, and what further epochs find in it.

    Args:
        stream: can be read once.
        samples: those that were read of it already, in order.
        readings: the iterators that have read them. The first goes on; a generator that is dropped would close another
            one that it hands on.

    Attributes:
        trains: whether the next one who reads it trains, and does not only look.
    """

    def __init__(self, stream: IterableDataset[Any], samples: list[Any], readings: Sequence[Iterator[Any]]) -> None:
        self._stream, self._samples, self._readings = stream, samples, readings
        self._is_handed_over = False
        self.trains = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that has no attributes yet, too
            raise AttributeError(name)
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        if self.trains and self._is_handed_over:
            yield from self._stream
            return
        yield from self._samples
        if self._is_handed_over:
            return
        self._is_handed_over = self.trains
        for sample in self._readings[0]:
            if not self._is_handed_over:
                self._samples.append(sample)
            yield sample


class HandOver(TrainerCallback):
    """Tells a stream when training reads it."""

    def __init__(self, stream: ReadOnce) -> None:
        self._stream = stream

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The batches of an epoch are about to be read."""
        self._stream.trains = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on, batches are looked at again."""
        self._stream.trains = False


def keep_what_is_looked_at(trainer: Trainer) -> None:
    """Exchange a train set that can be read once for one that keeps what is read of it before training.

    Whether it can, two readings of its first sample tell; where they differ because samples are drawn at random,
    nothing is lost either, and one comes twice. Workers of a loader read copies of their own, and the library
    `datasets` begins anew each time.
    """
    stream = trainer.train_dataset
    if not isinstance(stream, IterableDataset) or trainer.args.dataloader_num_workers > 0:
        return
    if type(stream).__module__.startswith("datasets."):
        return
    with random_state_kept(trainer.args.device):
        readings = (iter(stream), iter(stream))
        samples = [next(reading, None) for reading in readings]
    if _same(*samples):
        return
    logger.info("The train set can be read once: what is looked at before training is kept, and comes first in it.")
    trainer.train_dataset = ReadOnce(stream, [sample for sample in samples if sample is not None], readings)
    trainer.add_callback(HandOver(trainer.train_dataset))


def _same(one: Any, other: Any) -> bool:
    """Whether two samples hold the same."""
    ours, theirs = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (Tensor, np.ndarray)):
        return type(one) is type(other) and np.array_equal(np.asarray(one), np.asarray(other))
    return bool(one == other)
