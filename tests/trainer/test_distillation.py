import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_qat import QATConfig, prepare_qat
from hf_qat.errors import ConfigError
from hf_qat.trainer.distances import answer_of, distillation_loss, problem_of
from hf_qat.trainer.distillation import Distillation
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


def test_a_student_is_asked_before_it_has_ranges(caplog):
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    student = prepare_qat(resnet(), QATConfig(), inputs)
    Distillation(resnet(), 2.0, torch.device("cpu")).check(student, inputs)
    assert "never collected" not in caplog.text


def test_a_teacher_of_other_classes_is_refused_with_both_shapes():
    teacher = resnet()
    teacher.classifier[1] = nn.Linear(16, 7)
    distillation = Distillation(teacher, 2.0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"\(2, 7\).*\(2, 5\)"):
        distillation.check(resnet(), {"pixel_values": torch.randn(2, 3, 32, 32)})


def test_a_model_without_anything_to_compare_is_refused():
    for outputs in ({"last_hidden_state": torch.zeros(2)}, torch.zeros(2, 5), (torch.zeros(2, 5),)):
        with pytest.raises(ConfigError, match="the teacher, ResNetForImageClassification, .* returns nothing"):
            answer_of(outputs, "teacher", resnet())


def test_labels_that_the_students_loss_has_seen_are_compared_one_by_one():
    """Transformers' loss finds out at its first labels that an image can have several: a teacher gets none."""
    student, teacher, inputs = resnet().eval(), resnet(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    student.classifier[1].bias.data.add_(torch.arange(5.0))
    outputs = student(**inputs, labels=torch.eye(5)[:2])
    assert student.config.problem_type == "multi_label_classification" and teacher.config.problem_type is None
    p, q = (logits.detach().double().sigmoid().numpy() for logits in (teacher.eval()(**inputs).logits, outputs.logits))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    found = Distillation(teacher, 1.0, torch.device("cpu")).loss(student, outputs, inputs).item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_single_output_is_a_number_as_for_transformers_loss():
    student = resnet(labels=1).eval()
    teacher = copy.deepcopy(student)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    student.classifier[1].bias.data.add_(3.0)
    distillation = Distillation(teacher, 2.0, torch.device("cpu"))
    distillation.check(student, inputs)
    assert distillation.loss(student, student(**inputs), inputs).item() == pytest.approx(9.0, rel=1e-4)


def test_a_single_score_of_a_class_is_refused():
    with pytest.raises(ConfigError, match=r"'logits': \(2, 1\)"):
        answer_of({"logits": torch.zeros(2, 1)}, "student", resnet())


def test_queries_that_are_chosen_by_scores_are_refused():
    outputs = {"logits": torch.zeros(2, 4, 5), "pred_boxes": torch.zeros(2, 4, 4), "enc_topk_logits": torch.zeros(2)}
    with pytest.raises(ConfigError, match="cannot be compared"):
        answer_of(outputs, "student", yolos())


def test_a_detector_learns_from_one_like_it():
    distillation = Distillation(yolos(), 2.0, torch.device("cpu"))
    student, inputs = yolos(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    distillation.check(student, inputs)
    assert distillation.loss(student, student(**inputs), inputs).item() == pytest.approx(0.0, abs=1e-5)
    student.class_labels_classifier.layers[-1].bias.data.add_(torch.arange(6.0))
    loss = distillation.loss(student, student(**inputs), inputs)
    loss.backward()
    assert loss.item() > 0.1 and student.class_labels_classifier.layers[-1].bias.grad.abs().max() > 0


def distance(
    student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], temperature: float, **config
) -> float:
    model = resnet()
    for name, value in config.items():
        setattr(model.config, name, value)
    answer = answer_of(teacher, "teacher", model, problem_of(model, model))
    return answer.distance(student, teacher, model.config, temperature).item()


class TestOtherAnswersWorkedOutByHand:
    def test_labels_are_compared_one_by_one(self):
        """Probabilities 3/4 and 1/2 against 1/2 and 1/2; the second one is the teacher's own."""
        teacher, student = {"logits": torch.tensor([[math.log(3), 0.0]])}, {"logits": torch.zeros(1, 2)}
        expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
        found = distance(student, teacher, 1.0, problem_type="multi_label_classification")
        assert found == pytest.approx(expected, rel=1e-5)

    def test_numbers_by_their_squared_error(self):
        teacher, student = {"logits": torch.tensor([[1.0], [2.0]])}, {"logits": torch.tensor([[1.5], [4.0]])}
        assert distance(student, teacher, 3.0, problem_type="regression") == pytest.approx((0.25 + 4) / 2)

    def test_boxes_count_as_the_teacher_is_sure_of_them(self):
        """Two queries: one with 9 of 10 for a class, one with 1 of 10; boxes off by 0.4 and 4 in all."""
        scores = torch.tensor([[[math.log(9), -40.0, 0.0], [0.0, -40.0, math.log(9)]]])
        boxes = torch.zeros(1, 2, 4)
        teacher = {"logits": scores, "pred_boxes": boxes}
        student = {"logits": scores, "pred_boxes": boxes + torch.tensor([0.1, 1.0]).view(1, 2, 1)}
        expected = 5 * (0.9 * 0.4 + 0.1 * 4.0) / (0.9 + 0.1)
        assert distance(student, teacher, 1.0, num_labels=2) == pytest.approx(expected, rel=1e-5)

    def test_boxes_of_a_teacher_that_is_nearly_sure_of_nothing(self):
        """Both queries have e⁻²⁰ for a class, which 1 less the rest has no digits for in float32."""
        scores = torch.tensor([[[0.0, -40.0, 20.0], [0.0, -40.0, 20.0]]])
        teacher = {"logits": scores, "pred_boxes": torch.zeros(1, 2, 4)}
        student = {"logits": scores, "pred_boxes": torch.tensor([0.1, 0.2]).view(1, 2, 1).expand(1, 2, 4)}
        assert distance(student, teacher, 1.0, num_labels=2) == pytest.approx(5 * 0.6, rel=1e-4)

    def test_boxes_of_a_teacher_that_is_sure_of_nothing(self):
        """e⁻²⁰⁰ is 0 in float32."""
        scores = torch.tensor([[[0.0, 0.0, 200.0]]])
        teacher = {"logits": scores, "pred_boxes": torch.zeros(1, 1, 4)}
        student = {"logits": scores, "pred_boxes": torch.ones(1, 1, 4)}
        assert distance(student, teacher, 1.0, num_labels=2) == 0.0

    def test_boxes_of_independent_scores_count_by_the_highest_one(self):
        """Without a score for nothing: probabilities 9/10 and 1/10."""
        scores = torch.tensor([[[math.log(9), -40.0], [-40.0, -math.log(9)]]])
        teacher = {"logits": scores, "pred_boxes": torch.zeros(1, 2, 4)}
        student = {"logits": scores, "pred_boxes": torch.tensor([0.1, 1.0]).view(1, 2, 1).expand(1, 2, 4)}
        assert distance(student, teacher, 1.0, num_labels=2) == pytest.approx(5 * 0.76, rel=1e-4)

    def test_masks_pixel_by_pixel(self):
        """One of four pixels: 3/4 against 1/2; the classes are alike."""
        classes = torch.zeros(1, 1, 3)
        masks = torch.zeros(1, 1, 2, 2)
        masks[0, 0, 0, 0] = math.log(3)
        teacher = {"masks_queries_logits": masks, "class_queries_logits": classes}
        student = {"masks_queries_logits": torch.zeros(1, 1, 2, 2), "class_queries_logits": classes}
        expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 4
        assert distance(student, teacher, 1.0) == pytest.approx(expected, rel=1e-5)

    def test_depths_as_a_share_of_the_depth(self):
        teacher, student = torch.tensor([[[2.0, 6.0]]]), torch.tensor([[[3.0, 6.0]]])
        assert distance({"predicted_depth": student}, {"predicted_depth": teacher}, 2.0) == pytest.approx(1 / 8)

    def test_depths_of_a_teacher_that_sees_none(self):
        """There is no share of nothing; what the student gives stays a loss that can be learned from."""
        depth = torch.tensor([[[0.5, 0.0]]], requires_grad=True)
        answer = answer_of({"predicted_depth": torch.zeros(1, 1, 2)}, "teacher", resnet(), None)
        loss = answer.distance({"predicted_depth": depth}, {"predicted_depth": torch.zeros(1, 1, 2)}, None, 1.0)
        loss.backward()
        assert torch.isfinite(loss) and loss > 0
        assert torch.isfinite(depth.grad).all() and depth.grad[0, 0, 0] > 0
