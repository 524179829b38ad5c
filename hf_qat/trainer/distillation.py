"""Distillation: a float teacher's class probabilities, softened, as a second target (Hinton et al. 2015, §2)."""

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


logger = logging.get_logger(__name__)

#: Dimensions of logits whose axis 1 holds the classes: (N, C) of a classifier, (N, C, H, W) of a segmentation net.
CLASS_LOGITS_DIMS = (2, 4)

#: `problem_type` of the configs whose logits are no scores of classes that exclude each other.
OTHER_PROBLEMS = ("regression", "multi_label_classification")


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Distance of two predictions, T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the batch.

    T² keeps the gradient's size whatever the temperature is (Hinton et al. 2015, §2).

    Args:
        student, teacher: logits, (N, C) or (N, C, H, W); of the latter every pixel counts the same.
        temperature: T, above 0.

    Returns:
        () float32.
    """
    log_student = torch.log_softmax(student.float() / temperature, dim=1)
    log_teacher = torch.log_softmax(teacher.float() / temperature, dim=1)
    divergence = nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence.mean()


class Distillation:
    """A float teacher and what it teaches. No module holds it: it is neither trained nor saved.

    Args:
        teacher: gives `logits` of the student's shape for the student's inputs. It goes to `device`, for good.
        temperature: T of `distillation_loss`.
    """

    def __init__(self, teacher: nn.Module, temperature: float, device: torch.device) -> None:
        self.teacher = teacher.to(device).eval()
        self.temperature = temperature
        self._sum = torch.zeros((), device=device)
        self._count = 0

    def loss(self, student: nn.Module, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The distance of what the student answered to `inputs`, which hold no labels, from the teacher's answer.

        Raises:
            ConfigError: a model without logits of classes.
        """
        if self.teacher.training:
            logger.warning(
                "The teacher is in training mode, in which its dropout and batch norm teach noise: it is put back "
                "into evaluation mode. Do not call train() of it, nor of a module that holds it."
            )
            self.teacher.eval()
        with torch.no_grad():
            taught = self.teacher(**inputs)
        logits = class_logits(outputs, "student", student)
        loss = distillation_loss(logits, class_logits(taught, "teacher", self.teacher), self.temperature)
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
            ConfigError: a model without logits of classes, or logits of two shapes.
        """
        shapes = {}
        for role, model in (("student", student), ("teacher", self.teacher)):
            args, kwargs = pytree.tree_map_only(Tensor, partial(Tensor.to, device=device_of(model)), as_call(inputs))
            with evaluating(model):
                shapes[role] = tuple(class_logits(model(*args, **kwargs), role, model).shape)
        if shapes["teacher"] != shapes["student"]:
            raise ConfigError(
                f"the teacher's logits have shape {shapes['teacher']} and the student's {shapes['student']}: a "
                "teacher must be trained on the same classes, and give logits of the same size."
            )


def loss_is_scaled(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether `training_step` takes a loss as it is; else it divides it by the number of accumulated batches."""
    stated: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)  # newer than our oldest transformers
    if stated is not None:
        return stated
    by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_model or trainer.compute_loss_func is not None


def class_logits(outputs: Any, role: str, model: nn.Module) -> Tensor:
    """The logits in a model's outputs, (N, C) or (N, C, H, W): `outputs["logits"]`.

    Args:
        outputs: what forward returned.
        role, model: whose they are, for the message.

    Raises:
        ConfigError: there are none, or they are no scores of classes that exclude each other.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor):
        found = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ConfigError(
            f"distillation compares logits, and the {role}, {type(model).__name__}, returns none but: {found}. "
            "Train without a teacher."
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if logits.dim() not in CLASS_LOGITS_DIMS or logits.shape[1] < 2 or problem in OTHER_PROBLEMS:
        raise ConfigError(
            "distillation takes scores of two or more classes that exclude each other, of shape (N, C) or (N, C, H, W)"
            f", and those of the {role}, {type(model).__name__}, have shape {tuple(logits.shape)}, problem_type "
            f"{problem!r}. Train without a teacher."
        )
    return logits
