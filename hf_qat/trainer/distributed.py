"""`ManyProcesses`: the part of `QATTrainer` that makes N processes train what one process would.

accelerate starts them and wraps the model, as it does for any Trainer; see `ddp.py` and `fsdp.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_qat.graph.capture.modes import modes_kept
from hf_qat.quantization.collectives import min_over_ranks
from hf_qat.trainer.ddp import average_gradients, copy_from_first_rank, leave_out_of_ddp, without_gradient
from hf_qat.trainer.fsdp import is_sharded, saved_whole, shard
from hf_qat.trainer.optimizer import scale_parameters
from hf_qat.trainer.random_state import random_state_kept


logger = logging.get_logger(__name__)

#: Names of parameters that a message gives.
NAMED = 5


class ManyProcesses(Trainer):
    """A Trainer of a prepared model that DDP and FSDP2 can wrap."""

    model: nn.Module
    _example: Mapping[str, Any] | None = None
    """A batch with labels, between the preparing of a model and its first step."""

    def synchronize_initial_model(self, model: nn.Module, batch: Mapping[str, Any] | None) -> None:
        """Begin with a float or prepared model: where the training runs, and the same in all processes.

        Args:
            batch: any, with labels, to rehearse a step with before the training.
        """
        if self.is_fsdp_enabled:
            model.to(self.args.device)  # Trainer leaves that to FSDP, which does not know of scales
        copy_from_first_rank(model, self.args.device)
        one_batch = self.args.world_size == 1 and self.args.gradient_accumulation_steps == 1
        self._example = None if one_batch else batch

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's; before, the model is split, or what DDP is to expect of it is settled."""
        batch, self._example = self._example, None
        unused = self._settle_scaling(batch)
        if self.is_fsdp_enabled:
            if not is_sharded(self.model):
                shard(self.model, self.accelerator)
        elif self.args.world_size > 1:
            leave_out_of_ddp(self.model)
            self._forget_evaluation()
            if self.args.ddp_find_unused_parameters is None and self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.find_unused_parameters = unused
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _forget_evaluation(self) -> None:
        """Let accelerate wrap the model, which an `evaluate()` before `train()` has marked as done.

        Without DDP each process would train on its own, and nobody would notice.
        """
        if self.model_wrapped is self.model and vars(self.model).pop("_is_accelerate_prepared", False):
            self.accelerator._models[:] = [model for model in self.accelerator._models if model is not self.model]

    def _settle_scaling(self, batch: Mapping[str, Any] | None) -> bool:
        """Find out whether the model divides its loss by `num_items_in_batch`, and leaves parameters without gradient.

        Trainer believes the former of every model with `**kwargs`. Those that do not look at them, such as ResNet,
        would get gradients N times as large from N processes, and from N accumulated batches. What batches show may
        differ between processes, and all must act alike: they agree.

        Returns:
            Whether DDP must look for unused parameters; true also where it cannot be found out.
        """
        if not min_over_ranks(int(batch is not None)):
            return True
        assert batch is not None
        loss = self._rehearse(batch, 1, gradients=True)
        if not min_over_ranks(int(loss is not None)):
            return True
        assert loss is not None
        if self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            again = self._rehearse(batch, 2, gradients=False)
            divided = again is not None and bool(again.abs() < 0.75 * loss.detach().abs())
            self.model_accepts_loss_kwargs = bool(min_over_ranks(int(divided)))
        return not min_over_ranks(int(not self._has_unused(loss)))

    def _rehearse(self, batch: Mapping[str, Any], num_items: int, gradients: bool) -> torch.Tensor | None:
        """The loss of a training step that leaves no trace; `None` where a user's own `compute_loss` fails outside."""
        by_user = self._is_loss_of_the_user()
        compute_loss: Any = self.compute_loss if by_user else partial(Trainer.compute_loss, self)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with (
                random_state_kept(self.args.device),
                modes_kept(self.model),
                torch.set_grad_enabled(gradients),
                self.accelerator.autocast(),
            ):
                inputs = self._prepare_inputs(dict(batch))
                self.model.train()
                items = torch.tensor(num_items, device=self.args.device)
                loss: torch.Tensor = compute_loss(self.model, inputs, num_items_in_batch=items)
        except Exception as error:
            if not by_user:
                raise
            logger.warning(f"compute_loss fails before the first step ({error}); DDP will look for unused parameters.")
            return None
        finally:
            for buffer, before in buffers:
                buffer.data.copy_(before)  # by `data`: the graph of the loss is looked at, and not run
        return loss

    def _is_loss_of_the_user(self) -> bool:
        """Whether a subclass has a `compute_loss` of its own."""
        owner = next(cls for cls in type(self).__mro__ if "compute_loss" in vars(cls))
        return not owner.__module__.startswith(("hf_qat.", "transformers."))

    def _has_unused(self, loss: torch.Tensor) -> bool:
        """Whether the loss leaves any parameter without a gradient, which DDP must then look for in every step."""
        names = without_gradient(self.model, loss)
        if names:
            logger.warning(
                f"The loss does not depend on {len(names)} parameters of {type(self.model).__name__} "
                f"({', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}), so DDP looks for them in every "
                "step. To save that time, freeze them by requires_grad_(False); or, if training does use them, say "
                "ddp_find_unused_parameters=False."
            )
        return bool(names)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; with the last batch of an optimizer step, the gradients of scales are averaged."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            average_gradients(scale_parameters(self.model))
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; a split model is not wrapped for mixed precision, and gets it here."""
        with self.accelerator.autocast() if self.is_fsdp_enabled else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; of a split model, too, what `from_pretrained` loads."""
        with saved_whole(self.accelerator) if self.is_fsdp_enabled else nullcontext():
            super().save_model(output_dir, _internal_call)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, also before training: accelerate takes no model for FSDP2 that has no optimizer yet."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            self.accelerator._models.append(self.model)  # so Trainer takes it as prepared; it is whole still
        return super().evaluation_loop(*args, **kwargs)
