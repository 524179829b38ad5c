"""Detectors that return boxes and scores as one tensor, as YOLOv5, YOLOX and YOLOv8 do."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, convert, export_onnx, prepare_qat
from hf_qat.graph.captured import captured_modules
from hf_qat.quantization.quantizer import fake_quantizers


#: Pixels from one place of the feature map to the next.
STRIDE = 32

#: A score is rounded to 1/256, and what it is computed from to 8 bits, too.
SCORE_ERROR = 0.02

#: Root of the mean square. A step of 256 over boxes that span 640 pixels is 2.5, which alone gives 0.7.
PIXEL_ERROR = 0.5


class Detector(nn.Module):
    """One level of a detector, over a map of 20x20 places."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.boxes, self.objectness, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 3, 1)
        y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
        self.register_buffer("grid", torch.stack((x, y), -1).view(1, 400, 2))

    def heads(self, x: Tensor) -> list[Tensor]:
        """(N, 400, 4) and (N, 400, 1) and (N, 400, 3)"""
        x = self.body(x).relu()
        return [head(x).flatten(2).transpose(1, 2) for head in (self.boxes, self.objectness, self.classes)]


class YOLOv5(Detector):
    """One sigmoid over all, boxes around the places of a grid."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat(self.heads(x), -1).sigmoid()
        middle = (y[..., :2] * 2 - 0.5 + self.grid) * STRIDE
        return torch.cat((middle, (y[..., 2:4] * 2) ** 2 * STRIDE, y[..., 4:]), -1)


class YOLOX(Detector):
    """Boxes and scores are joined first, and boxes decoded in place."""

    def forward(self, x: Tensor) -> Tensor:
        boxes, objectness, classes = self.heads(x)
        y = torch.cat((boxes, objectness.sigmoid(), classes.sigmoid()), -1).clone()
        y[..., :2] = (y[..., :2] + self.grid) * STRIDE
        y[..., 2:4] = y[..., 2:4].exp() * STRIDE
        return y


class Product(Detector):
    """The score is the product of objectness and class."""

    def forward(self, x: Tensor) -> Tensor:
        boxes, objectness, classes = self.heads(x)
        scores = objectness.sigmoid() * classes.sigmoid()
        middle = (boxes[..., :2] + self.grid) * STRIDE
        return torch.cat((torch.cat((middle, boxes[..., 2:].exp() * STRIDE), -1), scores), -1)


class Logits(Detector):
    """YOLOv8's way to decode: distances from places; scores before their sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        distances, objectness, classes = self.heads(x)
        low, high = self.grid - distances[..., :2], self.grid + distances[..., 2:]
        boxes = torch.cat(((low + high) / 2, high - low), -1) * STRIDE
        return torch.cat((boxes, objectness, classes), -1)


class Apart(Detector):
    """Boxes and scores are outputs of their own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes, objectness, classes = self.heads(x)
        middle, size = (boxes[..., :2] + self.grid) * STRIDE, boxes[..., 2:].exp() * STRIDE
        return torch.cat((middle - size / 2, middle + size / 2), -1), torch.cat((objectness, classes), -1)


class LearnedOffset(nn.Module):
    """What is added after the last layer is trained, and no grid."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.offset = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x) + self.offset


class Masked(nn.Module):
    """Joins a mask with features."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.mask = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.features(x), self.mask(x).sigmoid()), 1)


class InParts(nn.Module):
    """Takes labels, so that each child has a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.masked, self.last = Masked(), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.last(self.masked(x))


def images(batch: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(batch, 3, 20, 20, generator=torch.Generator().manual_seed(seed)) - 1


def calibrated(model: nn.Module, target: str) -> nn.Module:
    prepared = prepare_qat(copy.deepcopy(model), QATConfig(target=target), example_inputs=images(2))
    return calibrate(prepared, [images(8, seed) for seed in range(3)]).eval()


@pytest.mark.parametrize("target", ["int8", "TDA4VM", "AM68A"])
@pytest.mark.parametrize("kind", [YOLOv5, YOLOX, Product, Logits])
@torch.no_grad()
def test_scores_beside_boxes_in_pixels_are_those_of_the_float_model_within_a_step(kind, target):
    torch.manual_seed(0)
    float_model = kind().eval()
    model, x = calibrated(float_model, target), images(4, seed=9)
    off, expected = (model(x) - float_model(x)).abs(), float_model(x)
    assert expected[..., :4].max() > 600 and expected[..., 4:].max() < 4
    assert off[..., 4:].max() < SCORE_ERROR
    assert off[..., :4].square().mean().sqrt() < PIXEL_ERROR


@torch.no_grad()
def test_the_file_has_these_scores_too(tmp_path):
    torch.manual_seed(0)
    float_model, x = YOLOv5().eval(), images(1, seed=9)
    export_onnx(convert(calibrated(float_model, "int8")), tmp_path / "model.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(found) - float_model(x))[..., 4:].abs().max() < SCORE_ERROR


@pytest.mark.parametrize("target", ["int8", "TDA4VM", "AM68A"])
@torch.no_grad()
def test_boxes_apart_from_scores_are_decoded_in_float(target):
    torch.manual_seed(0)
    float_model = Apart().eval()
    model, x = calibrated(float_model, target), images(4, seed=9)
    (boxes, scores), (expected, wanted) = model(x), float_model(x)
    assert expected.max() > 600
    assert (boxes - expected).square().mean().sqrt() < PIXEL_ERROR
    assert (scores - wanted).abs().max() < SCORE_ERROR * wanted.abs().max()


def test_a_trained_summand_after_the_last_layer_is_quantized():
    (part,) = captured_modules(calibrated(LearnedOffset(), "int8")).values()
    assert not part.float_operations


MODELS = {"one graph": lambda: nn.Sequential(Masked(), nn.Conv2d(5, 2, 1)), "two parts": InParts}


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_later_layer_reads_as_one_tensor_has_one_quantizer(kind):
    model = calibrated(MODELS[kind](), "int8")
    names = [path.rpartition(".")[2] for path in fake_quantizers(model)]
    assert names.count("cat_0_quantizer") == 1 and "sigmoid_0_quantizer" not in names
    assert not any(part.float_operations for part in captured_modules(model).values())
