"""Whether a loss of the user's own is divided by `num_items_in_batch`: seen in the first step, which is run anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Trainer

from hf_qat.trainer.batches import method_replaced


class Watch(TorchFunctionMode):
    """Inside, `used` becomes true if anything is computed with one tensor; reading its attributes does not count."""

    def __init__(self, tensor: object) -> None:
        super().__init__()
        self.used = False
        self._tensor = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = getattr(func, "__name__", "") == "__get__"
        if not reads and any(value is self._tensor for value in (*args, *(kwargs or {}).values())):
            self.used = True
        return func(*args, **(kwargs or {}))


@contextmanager
def scaled_as_it_turns_out(trainer: Trainer, num_items_in_batch: Tensor | int | None = None) -> Iterator[None]:
    """Inside, a training step divides the loss by the number of accumulated batches unless it is divided already.

    Trainer takes it from `model_accepts_loss_kwargs`, that is from the model, and in all further steps, too. Several
    processes have rehearsed it.
    """
    if trainer.args.world_size > 1 or num_items_in_batch is None:
        yield
        return
    compute = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        with Watch(num_items_in_batch) as watch:
            result = compute(*args, **kwargs)
        trainer.model_accepts_loss_kwargs = watch.used
        return result

    with method_replaced(trainer, "compute_loss", compute_loss):
        yield
