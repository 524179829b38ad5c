import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_qat.errors import ConfigError
from hf_qat.trainer.distillation import Distillation, class_logits, distillation_loss
from tests.models import resnet, segformer, yolos


def test_the_loss_is_that_of_a_two_class_example_worked_out_by_hand():
    # T = 2: softmax(0, 2 ln 3 / 2) = (1/4, 3/4) and softmax(0, 0) = (1/2, 1/2)
    teacher, student = torch.tensor([[0.0, 2 * math.log(3)]]), torch.zeros(1, 2)
    expected = 4 * (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-6)


def numpy_loss(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    def softmax(x: np.ndarray) -> np.ndarray:
        exponentials = np.exp(x / temperature)
        return exponentials / exponentials.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    return float(temperature**2 * (p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)], ids=["classes", "pixels"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_the_divergence_averaged_over_images_and_pixels(shape: tuple[int, ...], temperature: float):
    student, teacher = torch.randn(shape), 2 * torch.randn(shape)
    expected = numpy_loss(student.double().numpy(), teacher.double().numpy(), temperature)
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_teacher_itself_has_no_loss_and_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = distillation_loss(logits, logits.detach(), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    assert distillation_loss(student, teacher, 2.0).dtype == torch.float32


def test_a_teacher_predicts_in_evaluation_mode_and_without_gradients():
    teacher = resnet().train()
    distillation = Distillation(teacher, 2.0, torch.device("cpu"))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    student = resnet()
    student.classifier[1].bias.data.add_(torch.arange(5.0))
    running = [buffer.clone() for buffer in teacher.buffers()]
    distillation.loss(student, student(**inputs), inputs).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(map(torch.equal, running, teacher.buffers()))
    assert student.classifier[1].bias.grad.abs().max() > 0


def test_the_mean_loss_starts_anew_each_time_it_is_asked_for():
    distillation = Distillation(resnet(), 2.0, torch.device("cpu"))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    answers = [ImageClassifierOutput(logits=torch.randn(2, 5)) for _ in range(3)]
    losses = [distillation.loss(resnet(), answer, inputs).item() for answer in answers[:2]]
    assert distillation.mean_loss() == pytest.approx(sum(losses) / 2)
    last = distillation.loss(resnet(), answers[2], inputs).item()
    assert distillation.mean_loss() == pytest.approx(last)


@pytest.mark.parametrize("make", [resnet, segformer])
def test_a_teacher_that_fits_passes_and_both_models_stay_as_they_were(make):
    student = make().train()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    Distillation(make(), 2.0, torch.device("cpu")).check(student, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert student.training
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_a_teacher_of_other_classes_is_refused_with_both_shapes():
    teacher = resnet()
    teacher.classifier[1] = nn.Linear(16, 7)
    distillation = Distillation(teacher, 2.0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"\(2, 7\).*\(2, 5\)"):
        distillation.check(resnet(), {"pixel_values": torch.randn(2, 3, 32, 32)})


def test_logits_of_boxes_are_refused():
    distillation = Distillation(yolos(), 2.0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"YolosForObjectDetection, have shape \(2, 5, 6\)"):
        distillation.check(yolos(), {"pixel_values": torch.randn(2, 3, 32, 32)})


@pytest.mark.parametrize("outputs", [{"predicted_depth": torch.zeros(2)}, torch.zeros(2, 5), (torch.zeros(2, 5),)])
def test_a_model_without_logits_is_refused(outputs: object):
    with pytest.raises(ConfigError, match="the teacher, ResNetForImageClassification, returns none"):
        class_logits(outputs, "teacher", resnet())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_scores_that_do_not_exclude_each_other_are_refused(problem: str):
    model = resnet()
    model.config.problem_type = problem
    with pytest.raises(ConfigError, match=problem):
        class_logits({"logits": torch.zeros(2, 5)}, "student", model)


def test_a_single_score_is_refused():
    with pytest.raises(ConfigError, match=r"shape \(2, 1\)"):
        class_logits({"logits": torch.zeros(2, 1)}, "student", resnet())
