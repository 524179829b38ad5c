"""A file in the place of its model: what ONNX Runtime computes comes from it, and all else from the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from hf_qat.errors import ExportError
from hf_qat.export.runtime_model import RuntimeModel


@dataclass
class Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


class Doubling(nn.Module):
    """Doubles its input, and has a loss and features besides; the files below add 1 to the logits."""

    config, main_input_name = "a config", "pixel_values"

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Output:
        loss = None if labels is None else functional.mse_loss(pixel_values, labels)
        return Output(loss, 2 * pixel_values, 3 * pixel_values)


FILE = "g (float[N, 2] pixel_values) => (float[N, 2] logits) <float one = {1.0}> {"


@pytest.fixture
def written(parse, tmp_path: Path):
    """`written(text)`: the path of a file from ONNX' text format."""

    def write(text: str = FILE + "d = Add(pixel_values, pixel_values) logits = Add(d, one) }") -> Path:
        (tmp_path / "model.onnx").write_bytes(parse(text).SerializeToString())
        return tmp_path / "model.onnx"

    return write


def test_outputs_that_the_file_has_are_onnx_runtimes_and_the_others_the_models(written):
    model = RuntimeModel(Doubling(), written()).eval()
    x = torch.randn(3, 2)
    outputs = model(pixel_values=x, labels=torch.zeros(3, 2))
    assert isinstance(outputs, Output) and model.config == "a config"
    torch.testing.assert_close(outputs.logits, 2 * x + 1)
    torch.testing.assert_close(outputs.features, 3 * x)
    torch.testing.assert_close(outputs.loss, (x**2).mean())
    assert model(pixel_values=x).loss is None


def test_an_output_of_the_name_of_an_input_is_told_from_it(written):
    class Same(nn.Module):
        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"pixel_values": 2 * pixel_values}

    text = "g (float[N, 2] pixel_values) => (float[N, 2] pixel_values_1) "
    model = RuntimeModel(Same(), written(text + "{ pixel_values_1 = Neg(pixel_values) }"))
    x = torch.randn(3, 2)
    torch.testing.assert_close(model(pixel_values=x)["pixel_values"], -x)


def test_it_is_called_and_asked_as_the_model_is(written):
    model, x = RuntimeModel(Doubling(), written()).eval(), torch.randn(3, 2)
    torch.testing.assert_close(model(x, torch.zeros(3, 2)).logits, 2 * x + 1)
    assert model.main_input_name == "pixel_values"
    with pytest.raises(AttributeError, match="'Doubling' object has no attribute 'nothing'"):
        model.nothing  # noqa: B018


def test_a_batch_without_an_input_of_the_file_is_refused_by_name(written):
    text = FILE.replace("(float[N, 2] pixel_values)", "(float[N, 2] pixel_values, float[N, 2] mask)")
    model = RuntimeModel(Doubling(), written(text + "logits = Add(pixel_values, mask) }"))
    with pytest.raises(ExportError, match="takes mask, which the batch has not; it has pixel_values"):
        model(pixel_values=torch.zeros(1, 2))


def test_a_file_of_another_model_is_refused_by_the_name_of_its_output(written):
    text = FILE.replace("logits)", "boxes)")
    model = RuntimeModel(Doubling(), written(text + "boxes = Add(pixel_values, one) }"))
    with pytest.raises(ExportError, match="outputs that the model has not: boxes"):
        model(pixel_values=torch.zeros(1, 2))


def test_a_model_that_returns_a_tuple_is_refused(written):
    class Tuple(Doubling):
        def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
            return (pixel_values,)

    with pytest.raises(ExportError, match="Tuple returns a tuple instead of a ModelOutput"):
        RuntimeModel(Tuple(), written())(pixel_values=torch.zeros(1, 2))
