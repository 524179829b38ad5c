"""The model card: what the Hub reads of it, and what a reader is told."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from hf_qat import calibrate, convert, prepare_qat
from hf_qat.config.qat_config import QATConfig
from hf_qat.publish.card import CardFacts, CardOptions, render
from hf_qat.publish.directory import ONNX, makes_inputs, write_contents
from hf_qat.publish.summary import summarize
from tests.exported import BASE, Exported, tiny_resnet
from tests.models import spread


@pytest.fixture(scope="module")
def card(exported: Exported) -> ModelCard:
    return ModelCard.load(exported.directory / "README.md")


def described_with(accuracy: dict, dataset: str | None = None, **options: object) -> ModelCard:
    """The card of a training checkpoint that was measured."""
    facts = CardFacts(tiny_resnet(), "user/tiny", QATConfig(), {}, "qat", accuracy, 10, dataset)
    return ModelCard(str(render(facts, CardOptions(**options))))


def described(name_or_path: str = "", **options: object) -> ModelCard:
    """The card of a training checkpoint that nothing was measured of."""
    model = tiny_resnet()
    model.config._name_or_path = name_or_path
    facts = CardFacts(
        model=model,
        repo_id="user/tiny",
        config=QATConfig("TDA4VM"),
        schedule={},
        measured_as="quantized",
        accuracy={},
        images=0,
        dataset=None,
    )
    return ModelCard(str(render(facts, CardOptions(**options))))


def test_the_metadata_is_what_the_hub_looks_for(card: ModelCard):
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "apache-2.0",
    )
    assert (data.base_model, data.base_model_relation) == (BASE, "quantized")
    assert data.tags == ["hf_qat", "qat", "int8", "onnx", "tidl", "tests"]
    assert data.metrics == ["accuracy"]


def test_the_table_has_the_figures_of_the_metadata(card: ModelCard):
    rows = re.findall(r"^\| (?!\||-)(.*) \| ([\d.]+) \|$", card.text.split("## Usage")[0], re.MULTILINE)
    table = {f"accuracy, {label.replace('`', '')}": float(value) for label, value in rows}
    assert table == {result.metric_name: pytest.approx(result.metric_value, 1e-3) for result in card.data.eval_results}
    assert len(table) == 4 and "On the 50 images" in card.text


def test_figures_are_rounded_as_a_person_would():
    card = described_with({"qat": {"accuracy": 98.33333333333333}, "float": {"accuracy": 0.98765432}})
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "accuracy, quantized, after training (QAT)": 98.33,
        "accuracy, float, before quantization": 0.9877,
    }


def test_it_shows_a_plot_of_the_stages_and_a_table_of_the_layers(exported: Exported, card: ModelCard):
    assert "![Accuracy by stage](accuracy.png)" in card.text
    with Image.open(exported.directory / "accuracy.png") as picture:
        assert picture.format == "PNG" and picture.width == 800
    table = card.text.split("What rounding costs, layer by layer")[1].split("</details>")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    paths = [row[0].strip("|` ") for row in rows]
    assert {"resnet.embedder.embedder.convolution", "classifier.1"} <= set(paths)
    assert all(len(row) == 6 for row in rows) and all(float(row[3]) > 10 for row in rows)


@pytest.mark.parametrize(
    ("dataset", "tags", "expected"),
    [
        ("ylecun/mnist", None, ["ylecun/mnist"]),
        ("ylecun/mnist", "a/b", ["a/b"]),
        ("beans", None, None),
        (None, None, None),
    ],
)
def test_data_sets_in_the_metadata_are_ids_of_the_hub(dataset, tags, expected):
    card = described_with({"qat": {"accuracy": 0.5}}, dataset, dataset_tags=tags)
    assert card.data.datasets == expected


def test_the_code_in_it_is_python(card: ModelCard):
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
    assert 'pipeline("image-classification", "tiny")' in blocks[0]


def test_recipe_schedule_layers_verification_check_and_versions_are_there(card: ModelCard):
    for text in (
        "target: AM68A",
        "| Steps | 24 of 24 |",
        "| int8, per channel | 4 |",
        "| `resnet.embedder.embedder.convolution` | Conv2d 7×7 | int8, per channel | 1176 | uint8 |",
        "Nothing is computed in float.",
        "on 16 real inputs",
        "| off | 100.00% |",
        "model/resnet.onnx on AM68A (J721S2): TIDL takes it",
        "transformers 5.",
    ):
        assert text in card.text, text


def test_it_names_no_place_on_this_machine(exported: Exported, card: ModelCard):
    assert str(exported.directory.parent) not in str(card)


@pytest.mark.parametrize("name", ["", "/home/somebody/model", "./runs/float", "hf_qat/publish", "resnet"])
def test_a_base_model_that_is_not_on_the_hub_is_not_claimed(name: str):
    data = described(name).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


def test_what_the_user_says_goes_into_the_metadata():
    data = described(
        BASE,
        language="en",
        tags=["mine", "hf_qat"],
        finetuned_from="other/model",
        tasks="image-feature-extraction",
        dataset_tags="somebody/squares",
    ).data
    assert (data.language, data.base_model, data.pipeline_tag) == ("en", "other/model", "image-feature-extraction")
    assert data.tags == ["hf_qat", "mine"] and data.datasets == ["somebody/squares"]


def test_nothing_is_said_of_what_was_not_measured():
    text = described().text
    assert "Not measured" in text and "It was not trained." in text
    assert "Verification" not in text and "onnxruntime" not in text.split("## Versions")[0]


def test_the_usage_of_a_model_without_an_auto_class_of_the_table_loads_it(tmp_path: Path):
    size = {"image_size": 32, "patch_size": 8, "encoder_stride": 8}
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **size
    )
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model = prepare_qat(spread(transformers.ViTForMaskedImageModeling(config)), QATConfig(), batch)
    convert(calibrate(model, [batch])).save_pretrained(tmp_path)
    facts = CardFacts(model, str(tmp_path), QATConfig(), {}, "calibrated", {}, 0, None)
    (code,) = re.findall(r"```python\n(.*?)```", str(render(facts, CardOptions())), re.DOTALL)
    names: dict[str, nn.Module] = {}
    exec(code, names)
    assert torch.equal(names["model"](**batch).reconstruction, model(**batch).reconstruction)


class Masked(transformers.PreTrainedModel):
    """Takes a mask beside the pixels, and goes through the images one by one in Python."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: transformers.PretrainedConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(3, 2)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = (pixel_values * pixel_mask[:, None]).mean((2, 3))
        return {"logits": torch.cat([self.head(image[None]) for image in pooled])}


def test_the_code_for_onnx_runtime_gives_the_file_all_its_inputs_and_the_batch_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "pixel_mask": torch.ones(2, 8, 8)}
    model = prepare_qat(Masked(transformers.PretrainedConfig()).eval(), QATConfig(), batch)
    convert(calibrate(model, [batch]))
    contents = write_contents(model, tmp_path, None, [batch])
    summary = summarize(model, contents.onnx.float_ops)
    facts = CardFacts(model, "me/masked", QATConfig(), {}, "calibrated", {}, 0, None, summary, contents)
    text = str(render(facts, CardOptions()))
    assert "MB; one image at a time |" in text

    one = {name: tensor[:1].numpy() for name, tensor in batch.items()}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(tmp_path / ONNX))
    monkeypatch.setattr("transformers.image_utils.load_image", lambda name: None)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda name: lambda *_, **__: one)
    for takes_photos in (False, True):  # arrays that the user has, or what the processor makes
        facts = replace(facts, contents=replace(contents, takes_photos=takes_photos))
        code = re.findall(r"```python\n(.*?)```", str(render(facts, CardOptions())), re.DOTALL)[1]
        assert ("AutoImageProcessor" in code) == takes_photos
        names: dict[str, Any] = {}
        exec(code, names)
        given = batch if takes_photos else {name: torch.zeros_like(tensor) for name, tensor in batch.items()}
        np.testing.assert_allclose(names["outputs"][0], model(**given)["logits"][:1].detach().numpy(), atol=1e-5)


def test_a_processor_that_wants_more_than_a_photo_does_not_make_the_inputs_of_one():
    """A matte is made from a trimap, too."""
    processor = transformers.VitMatteImageProcessorPil(size_divisor=32)
    file = onnx.helper.make_graph(
        [],
        "matte",
        [onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, ["n", 4, "h", "w"])],
        [],
    )
    assert not makes_inputs(processor, onnx.helper.make_model(file))
