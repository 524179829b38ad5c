"""How far a student's answer is from its teacher's: a distance for each kind of answer that a vision model gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_qat.errors import ConfigError


#: Dimensions of logits whose axis 1 holds the classes: (N, C) of a classifier, (N, C, H, W) of a segmentation net.
CLASS_LOGITS_DIMS = (2, 4)

#: Dimensions of numbers, (N, K).
NUMBERS_DIMS = 2

#: What boxes weigh beside classes: as in the loss of DETR (Carion et al. 2020, A.4).
BOX_WEIGHT = 5.0

Outputs = Mapping[str, Any]


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


def independent_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same where each score is a probability of its own: T² · KL of two Bernoullis, averaged over all of them."""
    x, p = student.float() / temperature, torch.sigmoid(teacher.float() / temperature)
    entropy = nn.functional.binary_cross_entropy(p, p)
    return temperature**2 * (nn.functional.binary_cross_entropy_with_logits(x, p) - entropy)


def _classes(student: Outputs, teacher: Outputs, config: Any, temperature: float) -> Tensor:
    """Logits of classes that exclude each other, of images or of pixels."""
    return distillation_loss(student["logits"], teacher["logits"], temperature)


def _labels(student: Outputs, teacher: Outputs, config: Any, temperature: float) -> Tensor:
    """Logits of labels of which an image can have several."""
    return independent_loss(student["logits"], teacher["logits"], temperature)


def _numbers(student: Outputs, teacher: Outputs, config: Any, temperature: float) -> Tensor:
    """Numbers that were learned by their squared error."""
    return nn.functional.mse_loss(student["logits"].float(), teacher["logits"].float())


def _boxes(student: Outputs, teacher: Outputs, config: Any, temperature: float) -> Tensor:
    """Classes and boxes query by query; a box counts as much as its teacher is sure that something is there."""
    ours, theirs = student["logits"], teacher["logits"]
    if theirs.shape[-1] == config.num_labels + 1:  # the last one is "nothing"
        classes = distillation_loss(ours.flatten(0, 1), theirs.flatten(0, 1), temperature)
        sure = theirs.float().softmax(-1)[..., :-1].sum(-1)  # 1 less the last would be 0 for scores below 1e-8
    else:
        classes = independent_loss(ours, theirs, temperature)
        sure = theirs.float().sigmoid().amax(-1)
    apart = (student["pred_boxes"].float() - teacher["pred_boxes"].float()).abs().sum(-1)
    boxes: Tensor = (sure * apart).sum() / sure.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return classes + BOX_WEIGHT * boxes


def _masks(student: Outputs, teacher: Outputs, config: Any, temperature: float) -> Tensor:
    """Classes and masks query by query."""
    ours, theirs = (outputs["class_queries_logits"].flatten(0, 1) for outputs in (student, teacher))
    masks = independent_loss(student["masks_queries_logits"], teacher["masks_queries_logits"], temperature)
    return distillation_loss(ours, theirs, temperature) + masks


def _depth(student: Outputs, teacher: Outputs, config: Any, temperature: float) -> Tensor:
    """Mean distance of depths, as a share of the teacher's mean depth; as it is where the teacher sees no depth."""
    ours, theirs = student["predicted_depth"].float(), teacher["predicted_depth"].float()
    depth = theirs.abs().mean()
    distance: Tensor = (ours - theirs).abs().mean() / torch.where(depth > 0, depth, 1.0)
    return distance


@dataclass(frozen=True)
class Answer:
    """A kind of answer.

    Attributes:
        names: outputs that are compared, and must have the same shapes.
        fits: whether a model with this `problem_of` and with these outputs gives it.
        distance: (student, teacher, config, temperature) → () float32.
    """

    names: tuple[str, ...]
    fits: Callable[[str | None, Outputs], bool]
    distance: Callable[[Outputs, Outputs, Any, float], Tensor]


def problem_of(student: nn.Module, teacher: nn.Module) -> str | None:
    """What both have learned: the `problem_type` of one's config, the student's first; `None` if it is not known.

    Transformers' loss writes it into the config of a model that it gets labels for, which a teacher never does; and
    it takes a single output for a number.
    """
    configs = [getattr(model, "config", None) for model in (student, teacher)]
    stated = next((found for config in configs if (found := getattr(config, "problem_type", None)) is not None), None)
    single = any(getattr(config, "num_labels", None) == 1 for config in configs)
    return _REGRESSION if stated is None and single else stated


def _has_classes(problem: str | None, outputs: Outputs) -> bool:
    logits = outputs["logits"]
    return bool(logits.dim() in CLASS_LOGITS_DIMS and logits.shape[1] > 1 and problem in (None, _SINGLE))


def _has_numbers(problem: str | None, outputs: Outputs) -> bool:
    return bool(problem == _REGRESSION and outputs["logits"].dim() == NUMBERS_DIMS)


_SINGLE, _SEVERAL, _REGRESSION = "single_label_classification", "multi_label_classification", "regression"

#: The first one that fits, of those whose outputs are there.
ANSWERS = (
    Answer(("masks_queries_logits", "class_queries_logits"), lambda problem, outputs: True, _masks),
    Answer(("logits", "pred_boxes"), lambda problem, outputs: True, _boxes),
    Answer(("predicted_depth",), lambda problem, outputs: True, _depth),
    Answer(("logits",), lambda problem, outputs: problem == _SEVERAL, _labels),
    Answer(("logits",), _has_numbers, _numbers),
    Answer(("logits",), _has_classes, _classes),
)

#: Outputs of detectors whose queries are chosen by their scores: those of two models are not of the same places.
CHOSEN = ("enc_topk_logits", "enc_outputs_class")


def answer_of(outputs: Any, role: str, model: nn.Module, problem: str | None = None) -> Answer:
    """What kind of answer a model has given.

    Args:
        outputs: what forward returned.
        role, model: whose they are, for the message.
        problem: the `problem_of` student and teacher.

    Raises:
        ConfigError: none that can be compared.
    """
    named = outputs if isinstance(outputs, Mapping) else {}
    for answer in ANSWERS:
        if all(isinstance(named.get(name), Tensor) for name in answer.names) and answer.fits(problem, named):
            _require_fixed_queries(named, role, model)
            return answer
    shapes = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
    raise ConfigError(
        f"the {role}, {type(model).__name__}, with problem_type {problem!r}, returns nothing that can be "
        f"compared: {shapes or type(outputs).__name__}. A teacher teaches logits of two or more classes, of shape "
        "(N, C) or (N, C, H, W), labels, numbers, boxes, masks or depths. Train without a teacher."
    )


def _require_fixed_queries(outputs: Outputs, role: str, model: nn.Module) -> None:
    if any(outputs.get(name) is not None for name in CHOSEN):
        raise ConfigError(
            f"the queries of the {role}, {type(model).__name__}, are chosen by their scores, so that the same query "
            "is at another place in another model, and cannot be compared. Train without a teacher."
        )
