"""What is written for others, but for the card: read back by transformers, ONNX and the files' own names."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, DetrImageProcessorPil, ViTImageProcessorPil

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from hf_qat.errors import ExportError
from hf_qat.publish.directory import ONNX, save_model, write_contents
from tests.exported import processor, tiny_resnet
from tests.models import hand_written


PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """A converted model for each target."""
    made = {}
    for target in ("int8", "AM68A"):
        batch = {"pixel_values": PIXELS}
        made[target] = convert(calibrate(prepare_qat(tiny_resnet(), QATConfig(target), batch), [batch]))
    return made


def test_model_and_processor_come_back_by_transformers_and_the_onnx_file_is_there(
    models: dict[str, nn.Module], tmp_path: Path
):
    contents = write_contents(models["int8"], tmp_path, processor(), [{"pixel_values": PIXELS}])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(PIXELS).logits, models["int8"](PIXELS).logits)
    assert (tmp_path / "preprocessor_config.json").is_file() and contents.processor
    assert onnx.load(tmp_path / ONNX).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert contents.real_inputs and contents.onnx.samples == 4
    assert contents.tidl is None and contents.why_no_tidl == "" and not (tmp_path / "tidl").exists()


class OfItsOwnSize(ViTImageProcessorPil):
    """Of the size of the photo, but for less than 32 pixels, as processors that a fixed size is not asked of."""

    def __call__(self, images: Image.Image, **options: object) -> object:
        self.size = {"height": images.height // 32 * 32, "width": images.width // 32 * 32}
        return super().__call__(images, **options)


@pytest.mark.parametrize(
    ("processor", "takes_photos"),
    [(DetrImageProcessorPil(), False), (OfItsOwnSize(), False), (processor(), True), (None, False)],
    ids=["edges", "of its own size", "fixed", "none"],
)
def test_a_processor_that_config_yaml_has_no_words_for_does_not_cost_the_bundle(
    models: dict[str, nn.Module], processor: object, takes_photos: bool, tmp_path: Path
):
    contents = write_contents(models["AM68A"], tmp_path, processor, [{"pixel_values": PIXELS}])
    bundle = tmp_path / "tidl" / "AM68A"
    assert contents.tidl is not None and (bundle / "model" / "resnet.onnx").is_file()
    assert (bundle / "config.yaml").is_file() == contents.bundle_takes_photos == takes_photos
    assert contents.takes_photos == takes_photos and contents.inputs == (("pixel_values", (1, 3, 32, 32), "float32"),)


def test_without_images_the_file_is_verified_on_random_ones_and_tidl_gets_none(
    models: dict[str, nn.Module], tmp_path: Path
):
    contents = write_contents(models["AM68A"], tmp_path, None, [])
    assert not contents.real_inputs and not contents.processor and contents.onnx.samples == 2
    assert contents.tidl is None and "no data set" in contents.why_no_tidl and not (tmp_path / "tidl").exists()


def test_a_model_that_from_pretrained_could_not_load_is_refused(tmp_path: Path):
    x = torch.randn(2, 3, 16, 16)
    model = convert(calibrate(prepare_qat(hand_written(), QATConfig(), x), [x]))
    with pytest.raises(ExportError, match="HandWritten is no Hugging Face model"):
        save_model(model, tmp_path, None)
    assert not any(tmp_path.iterdir())
