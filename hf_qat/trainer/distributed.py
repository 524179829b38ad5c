"""N processes train what one would: what they agree on before the first step, and what DDP and FSDP2 need of a model.

accelerate starts the processes and wraps the model, as it does for any Trainer; see `ddp.py` and `fsdp.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_qat.errors import listed
from hf_qat.graph.capture.modes import modes_kept
from hf_qat.graph.captured import before_calibration
from hf_qat.graph.random_state import random_state_kept
from hf_qat.quantization.collectives import min_over_ranks
from hf_qat.trainer.batches import first_batch, silent
from hf_qat.trainer.ddp import copy_from_first_rank, leave_out_of_ddp, without_gradient
from hf_qat.trainer.fsdp import is_sharded, saved_whole, shard


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LossFacts:
    """What all processes agree on about the loss of a training step.

    Attributes:
        divided: the model divides its loss by `num_items_in_batch`. Trainer believes it of every model with
            `**kwargs`. Those that do not look at them, such as ResNet, would get gradients N times as large from N
            processes, and from N accumulated batches.
        leaves_unused: it leaves parameters without a gradient, or that is not known: DDP must look for them.
    """

    divided: bool
    leaves_unused: bool


def synchronize_initial_model(trainer: Trainer, model: nn.Module) -> None:
    """Put a float or prepared model where the training runs, the same in all processes."""
    if trainer.is_fsdp_enabled:
        model.to(trainer.args.device)  # Trainer leaves that to FSDP, which does not know of scales
    copy_from_first_rank(model, trainer.args.device)


def rehearse(trainer: Trainer, model: nn.Module, batch: Any, own_loss: bool = False) -> LossFacts:
    """Find out about the loss, by steps that leave no trace; none where nothing depends on what they would show.

    In one process, `compute_loss` of a user's own is not called: the first step will show it (`loss_scale.py`).

    What batches show may differ between processes, and all must act alike: they agree.

    Args:
        trainer: whose `compute_loss` gives the loss of the task.
        model: the trainer's, prepared.
        batch: with labels; `None` for the first one of the data, which is read if it is needed.
        own_loss: `compute_loss` is the user's own.
    """
    trainer = copy.copy(trainer)
    vars(trainer)["distillation"] = None  # the loss is that of the task
    believed, several = trainer.model_accepts_loss_kwargs, trainer.args.world_size > 1
    doubted = believed and trainer.compute_loss_func is None
    if not several and (own_loss or not doubted or trainer.args.gradient_accumulation_steps == 1):
        return LossFacts(believed, leaves_unused=False)
    batch = first_batch(trainer) if batch is None else batch
    loss = None if batch is None else _rehearsed_loss(trainer, model, batch, 1, gradients=several)
    if not min_over_ranks(int(loss is not None)):
        return LossFacts(believed, leaves_unused=True)
    assert batch is not None and loss is not None
    divided = believed
    if doubted:
        again = _rehearsed_loss(trainer, model, batch, 2, gradients=False)
        divided = bool(min_over_ranks(int(again is not None and bool(again.abs() < 0.75 * loss.detach().abs()))))
    unused = several and not min_over_ranks(int(not _has_unused(model, loss)))
    return LossFacts(divided, unused)


def make_ready_to_wrap(trainer: Trainer, model: nn.Module, facts: LossFacts) -> None:
    """Before the optimizer is made and accelerate wraps the model: split it, or settle what DDP is to expect of it."""
    if trainer.is_fsdp_enabled:
        if not is_sharded(model):
            shard(model, trainer.accelerator)
    elif trainer.args.world_size > 1:
        leave_out_of_ddp(model)
        _forget_evaluation(trainer, model)
        if trainer.args.ddp_find_unused_parameters is None and trainer.accelerator.ddp_handler is not None:
            trainer.accelerator.ddp_handler.find_unused_parameters = facts.leaves_unused


def make_ready_to_evaluate(trainer: Trainer) -> None:
    """Let Trainer evaluate a whole model before training: accelerate takes none for FSDP2 that has no optimizer."""
    if trainer.is_fsdp_enabled and not trainer.accelerator._models:
        trainer.accelerator._models.append(trainer.model)  # so Trainer takes it as prepared


@contextmanager
def autocast_if_sharded(trainer: Trainer) -> Iterator[None]:
    """Mixed precision for a split model, which accelerate does not wrap for it."""
    with trainer.accelerator.autocast() if trainer.is_fsdp_enabled else nullcontext():
        yield


@contextmanager
def gathered_to_save(trainer: Trainer) -> Iterator[None]:
    """Inside, `save_model` writes of a split model, too, what `from_pretrained` loads."""
    with saved_whole(trainer.accelerator) if trainer.is_fsdp_enabled else nullcontext():
        yield


def _rehearsed_loss(trainer: Trainer, model: nn.Module, batch: Any, num_items: int, gradients: bool) -> Tensor | None:
    """() of a training step that leaves no trace; `None` if it fails, as the first step then will, aloud."""
    device = trainer.args.device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with (
            random_state_kept(device),
            modes_kept(model),
            before_calibration(model),
            torch.set_grad_enabled(gradients),
            trainer.accelerator.autocast(),
            silent(trainer),
        ):
            inputs = trainer._prepare_inputs(dict(batch) if isinstance(batch, Mapping) else batch)
            model.train()
            items = torch.tensor(num_items, dtype=torch.int64, device=device)
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    except Exception as error:
        logger.warning(
            f"compute_loss fails before the first step ({error}): its scale is taken for what Trainer takes it for, "
            "and in several processes DDP looks for unused parameters in every step."
        )
        return None
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)  # by `data`: the graph of the loss is looked at, and not run
    assert isinstance(loss, Tensor)  # no outputs were asked for
    return loss


def _has_unused(model: nn.Module, loss: Tensor) -> bool:
    """Whether the loss leaves any parameter without a gradient, which DDP must then look for in every step."""
    names = without_gradient(model, loss)
    if names:
        logger.warning(
            f"The loss does not depend on {len(names)} parameters of {type(model).__name__} "
            f"({listed(names)}), so DDP looks for them in every step. To save that time, freeze them by "
            "requires_grad_(False); or, if training does use them, say ddp_find_unused_parameters=False."
        )
    return bool(names)


def _forget_evaluation(trainer: Trainer, model: nn.Module) -> None:
    """Let accelerate wrap the model, which an `evaluate()` before `train()` has marked as done.

    Without DDP each process would train on its own, and nobody would notice.
    """
    accelerator = trainer.accelerator
    if trainer.model_wrapped is model and vars(model).pop("_is_accelerate_prepared", False):
        accelerator._models[:] = [other for other in accelerator._models if other is not model]
