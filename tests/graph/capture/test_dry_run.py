import copy
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_qat import calibrate, convert, export_onnx, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.graph.capture.capture import capture
from hf_qat.graph.capture.inputs import changed_images


class Chooses(nn.Module):
    """Control flow that no graph can hold, around two layers that one can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(-x if x.sum() > 0 else x)


class MoreInTraining(nn.Module):
    """Returns what each of its layers predicts in training, and the last one's prediction in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for layer in self.layers:
            x = layer(x)
            results.append(x)
        return results if self.training else results[-1:]


class Detector(nn.Module):
    """As Hugging Face's: it has a main input, takes labels, and calls its parts."""

    main_input_name = "x"

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = head

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | list[Tensor]:
        return self.head(self.body(x))


@torch.no_grad()
def test_of_a_part_that_cannot_be_captured_its_children_are(caplog):
    torch.manual_seed(0)
    model = Detector(Chooses()).eval()
    twin = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        assert list(capture(model, torch.randn(2, 4))) == ["body", "head.first", "head.second"]
    warned = [record for record in caplog.records if record.name == "hf_qat.graph.capture.capture"]
    assert len(warned) == 1 and "the code of head itself stays float" in caplog.text
    for batch in (1, 2, 5):
        x = torch.randn(batch, 4)
        assert torch.equal(model(x), twin(x))


def test_a_part_that_computes_more_in_training_has_a_graph_that_does():
    model = Detector(MoreInTraining()).eval()
    assert list(capture(model, torch.randn(2, 4))) == ["body", "head"]
    assert len(model.train()(torch.randn(3, 4))) == 2
    assert len(model.eval()(torch.randn(3, 4))) == 1


def test_if_nothing_at_all_can_be_captured_the_first_reason_is_raised():
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum())

    model = Detector(Reads())
    model.body = Reads()
    with pytest.raises(CaptureError, match="^body cannot be captured"):
        capture(model, torch.randn(2, 4))


class WritesToIt(nn.Module):
    """The caller adds to what a child has returned, in place, as DETR's descendants add reference points."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.child(x)
        y[..., :2] += x[..., :2]
        return y


def test_an_output_that_the_caller_writes_to_may_have_been_saved_for_the_backward_pass():
    from hf_qat import QATConfig, calibrate, prepare_qat

    model, x = WritesToIt(), torch.randn(8, 4)
    prepare_qat(model, QATConfig(), x)
    calibrate(model, [x])
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.child.parameters())


class Caches(nn.Module):
    """Keeps, in evaluation, what it has computed from a parameter, until it is put into training: as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(6)), {}

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[torch.tensor([0, 2, 1, 5])]
        return x + (bias if self.training else self.cache.setdefault("bias", bias))


def test_a_cache_that_training_empties_does_not_hide_a_parameter():
    model = Detector(Caches())
    capture(model, torch.randn(2, 4))
    model(torch.randn(2, 4)).sum().backward()
    assert model.head.table.grad.tolist() == [2.0, 2.0, 2.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["alone", "tuple", "dict"])
def test_arrays_of_numpy_are_refused_with_what_makes_tensors_of_them(wrap):
    model, array = nn.Sequential(nn.Linear(4, 2)), np.zeros((2, 4))
    with pytest.raises(CaptureError, match=r'array of NumPy, float64: .*return_tensors="pt"'):
        prepare_qat(model, example_inputs=wrap(array))
    prepared = prepare_qat(model, example_inputs=torch.zeros(2, 4))
    with pytest.raises(CaptureError, match="array of NumPy"):
        calibrate(prepared, [wrap(array)])
    calibrate(prepared, [{"input": torch.ones(2, 4), "labels": array}])  # these are left out


def test_a_batch_of_nothing_is_refused_as_such():
    model, nothing = nn.Sequential(nn.Linear(4, 2)), torch.zeros(0, 4)
    with pytest.raises(CaptureError, match=r"\(0, 4\): give one image or more"):
        prepare_qat(model, example_inputs=nothing)
    prepared = calibrate(prepare_qat(model, example_inputs=torch.zeros(2, 4)), [torch.ones(2, 4)])
    with pytest.raises(CaptureError, match="give one image or more"):
        export_onnx(convert(prepared), "never.onnx", nothing, verify=False)


def test_an_image_of_one_number_is_changed_to_another_one():
    changed = changed_images(torch.ones(1, 1, 1, 1))
    assert changed.isfinite().all() and changed != 1
