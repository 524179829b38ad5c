"""Distillation: what a float teacher answers, softened, as a second target (Hinton et al. 2015, §2)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Trainer
from transformers.utils import logging

from hf_qat.errors import ConfigError
from hf_qat.graph.capture.inputs import Inputs, as_call, device_of
from hf_qat.graph.capture.modes import evaluating
from hf_qat.graph.captured import before_calibration
from hf_qat.trainer.distances import answer_of, problem_of


logger = logging.get_logger(__name__)


class Distillation:
    """A float teacher and what it teaches. No module holds it: it is neither trained nor saved.

    Args:
        teacher: answers the student's inputs with outputs of the student's shapes. It goes to `device`, for good.
        temperature: T of `distillation_loss`.
    """

    def __init__(self, teacher: nn.Module, temperature: float, device: torch.device) -> None:
        self.teacher = teacher.to(device).eval()
        self.temperature = temperature
        self._sum = torch.zeros((), dtype=torch.float32, device=device)
        self._count = 0

    def loss(self, student: nn.Module, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The distance of what the student answered to `inputs`, which hold no labels, from the teacher's answer.

        Raises:
            ConfigError: a model whose answers cannot be compared.
        """
        if self.teacher.training:
            logger.warning(
                "The teacher is in training mode, in which its dropout and batch norm teach noise: it is put back "
                "into evaluation mode. Do not call train() of it, nor of a module that holds it."
            )
            self.teacher.eval()
        with torch.no_grad():
            taught = self.teacher(**inputs)
        problem = problem_of(student, self.teacher)
        answer_of(outputs, "student", student, problem)
        answer = answer_of(taught, "teacher", self.teacher, problem)
        loss = answer.distance(outputs, taught, getattr(self.teacher, "config", None), self.temperature)
        self._sum += loss.detach()
        self._count += 1
        return loss

    def mean_loss(self) -> float:
        """Mean of `loss` since the last call."""
        mean = self._sum.item() / max(self._count, 1)
        self._sum.zero_()
        self._count = 0
        return mean

    @torch.no_grad()
    def check(self, student: nn.Module, inputs: Inputs) -> None:
        """Run both models once, so that a teacher that does not fit is found out before time is spent.

        Raises:
            ConfigError: a model whose answers cannot be compared, or answers of two shapes.
        """
        answers, problem = {}, problem_of(student, self.teacher)
        for role, model in (("student", student), ("teacher", self.teacher)):
            args, kwargs = pytree.tree_map_only(Tensor, partial(Tensor.to, device=device_of(model)), as_call(inputs))
            with evaluating(model), before_calibration(model):
                outputs = model(*args, **kwargs)
            answers[role] = {
                name: tuple(outputs[name].shape) for name in answer_of(outputs, role, model, problem).names
            }
        if answers["teacher"] != answers["student"]:
            raise ConfigError(
                f"the teacher answers with {answers['teacher']} and the student with {answers['student']}: a teacher "
                "must be trained on the same classes, and give outputs of the same sizes."
            )


def loss_is_scaled(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether `training_step` takes a loss as it is; else it divides it by the number of accumulated batches."""
    stated: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)  # newer than our oldest transformers
    if stated is not None:
        return stated
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_model or trainer.compute_loss_func is not None
