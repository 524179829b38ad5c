"""Labels of images and labels of a model: what is measured must be measured by the same ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_qat.cli.labels import labels_for
from hf_qat.cli.main import main
from hf_qat.cli.tasks import detection
from hf_qat.cli.tasks.classes import Classes
from hf_qat.errors import ConfigError
from tests.commands import data_sets_cached_in, last_json


def named(*names: str) -> Classes:
    return Classes(names, named=True)


class TestLabelsFor:
    @pytest.mark.parametrize("trains", [True, False])
    @pytest.mark.parametrize(
        ("classes", "own", "numbers"),
        [
            (named("cat", "dog"), ["dog", "cat"], [1, 0]),
            (named("golden_retriever", "Tabby"), ["tabby", "Golden Retriever"], [1, 0]),
            (named("a", "b"), ["a", "b"], [0, 1]),
            (named("crane", "crane"), ["crane", "crane"], [0, 1]),
            (Classes.numbered(2), ["cat", "dog"], [0, 1]),
        ],
        ids=["other order", "other spelling", "the same", "the same twice", "numbers"],
    )
    def test_a_model_keeps_its_names_and_each_class_gets_the_label_of_its_name(self, classes, own, numbers, trains):
        found = labels_for(classes, own, trains)
        assert (list(found.numbers), found.names, found.new_head) == (numbers, None, False)

    def test_labels_without_names_get_those_of_the_images(self):
        found = labels_for(named("cat", "dog"), ["LABEL_0", "LABEL_1"], trains=False)
        assert (list(found.numbers), found.names) == ([0, 1], ("cat", "dog"))

    def test_of_a_model_of_more_labels_some_can_be_measured(self):
        assert list(labels_for(named("cat", "eel"), ["eel", "dog", "cat"], trains=False).numbers) == [2, 0]
        assert list(labels_for(Classes.numbered(2), ["eel", "dog", "cat"], trains=False).numbers) == [0, 1]

    def test_what_a_model_is_to_learn_gets_a_new_head_where_the_number_is_another_one(self, caplog):
        found = labels_for(named("cat", "dog", "eel"), ["cat", "dog"], trains=True)
        assert (list(found.numbers), found.names, found.new_head) == ([0, 1, 2], ("cat", "dog", "eel"), True)
        assert "starts from random weights" in caplog.text

    def test_a_trained_head_is_not_lost_because_its_last_classes_are_in_no_image(self, caplog):
        found = labels_for(Classes.numbered(148), [f"class {k}" for k in range(150)], trains=True)
        assert found.names is None and not found.new_head
        assert "the model keeps its 150 labels" in caplog.text

    def test_names_that_have_nothing_in_common_are_taken_in_their_order_with_a_warning(self, caplog):
        found = labels_for(named("n01440764", "n01443537"), ["tench", "goldfish"], trains=False)
        assert (list(found.numbers), found.names) == ([0, 1], None)
        assert "in their order" in caplog.text

    @pytest.mark.parametrize(
        ("classes", "own"),
        [
            (named("cat", "dog", "eel"), ["cat", "dog"]),
            (named("cat", "eel"), ["cat", "dog"]),
            (named("cat"), ["dog", "eel"]),
            (named("cat"), ["LABEL_0", "LABEL_1"]),
            (Classes.numbered(3), ["cat", "dog"]),
        ],
    )
    def test_what_a_model_does_not_know_is_refused_where_nothing_is_learned(self, classes, own):
        with pytest.raises(ConfigError, match=rf"{len(classes.names)} classes .* {len(own)} labels"):
            labels_for(classes, own, trains=False)


class TestClasses:
    @pytest.mark.parametrize("value", [-1, 2, None, 0.5])
    def test_a_label_that_is_no_class_is_refused(self, value):
        with pytest.raises(ConfigError, match="a label is"):
            named("cat", "dog").number_of(value)

    def test_categories_of_objects_are_renumbered_and_boxes_are_not(self):
        objects = {"bbox": [[0, 0, 1, 1], [2, 3, 4, 5]], "category": ["dog", "cat"]}
        renumbered = detection.renumbered(objects, lambda name: {"cat": 7, "dog": 4}[name])
        assert renumbered == {"bbox": [[0, 0, 1, 1], [2, 3, 4, 5]], "category": [4, 7]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`photos/` of dark and light images, and `float/` with a model that tells them apart; its label 0 is light."""
    root, generator = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    for kind, grey in (("dark", 40), ("light", 215)):
        (root / "photos" / kind).mkdir(parents=True)
        for number in range(10):
            pixels = grey + generator.integers(-20, 20, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / kind / f"{number}.png")
    torch.manual_seed(0)
    labels = {"id2label": {0: "light", 1: "dark"}, "label2id": {"light": 0, "dark": 1}}
    config = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    config.update(labels)
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    images = [Image.open(root / "photos" / kind / "0.png") for kind in ("light", "dark")]
    with torch.no_grad():
        light, dark = model.vit(**processor(images, return_tensors="pt")).last_hidden_state[:, 0]
        model.classifier.weight.copy_(torch.stack([light - dark, dark - light]))
        middle = (light - dark) @ (light + dark) / 2
        model.classifier.bias.copy_(torch.stack([-middle, middle]))
    model.save_pretrained(root / "float")
    processor.save_pretrained(root / "float")
    model.vit.save_pretrained(root / "body")
    processor.save_pretrained(root / "body")
    with data_sets_cached_in(root):
        yield root


def options(folder: Path, model: str, images: str = "photos") -> list[str]:
    return ["--model_name_or_path", str(folder / model), "--dataset_name", str(folder / images)]


def as_jsonl(folder: Path, name: str, kinds: dict[str, object]) -> str:
    lines = [{"image": f"photos/{kind}/{k}.png", "label": label} for kind, label in kinds.items() for k in range(10)]
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return name


@pytest.mark.filterwarnings("ignore")
class TestCommands:
    @pytest.mark.slow
    def test_labels_in_another_order_than_the_folders_are_right_at_all_stages(self, folder, tmp_path, capsys):
        assert main(["evaluate", *options(folder, "float")]) == 0
        assert last_json(capsys.readouterr().out)["accuracy"] == 1.0
        assert main(["calibrate", *options(folder, "float"), "--output_dir", str(tmp_path / "int8")]) == 0
        stages = [line for line in capsys.readouterr().out.splitlines() if " accuracy " in line]
        assert len(stages) == 3 and all("accuracy 1" in line for line in stages)
        assert json.loads((tmp_path / "int8/config.json").read_text())["id2label"] == {"0": "light", "1": "dark"}
        file = tmp_path / "int8/onnx/model.onnx"
        assert main(["evaluate", *options(folder, str(file))]) == 0
        assert last_json(capsys.readouterr().out)["accuracy"] == 1.0

    def test_numbers_in_a_jsonl_file_are_those_of_the_model(self, folder, capsys):
        images = as_jsonl(folder, "numbers.jsonl", {"light": 0, "dark": 1})
        assert main(["evaluate", *options(folder, "float", images)]) == 0
        assert last_json(capsys.readouterr().out)["accuracy"] == 1.0

    def test_one_of_the_classes_can_be_measured_alone(self, folder, capsys):
        for images in ({"dark": "dark"}, {"dark": 1}):
            assert main(["evaluate", *options(folder, "float", as_jsonl(folder, "one.jsonl", images))]) == 0
            assert last_json(capsys.readouterr().out)["accuracy"] == 1.0

    @pytest.mark.slow
    def test_images_of_other_classes_are_no_measure_and_calibrate_without_one(self, folder, tmp_path, capsys):
        images = as_jsonl(folder, "others.jsonl", {"light": "beach", "dark": "dark"})
        assert main(["evaluate", *options(folder, "float", images)]) == 2
        assert "2 classes (beach, dark), the model has 2 labels (light, dark)" in capsys.readouterr().err
        arguments = options(folder, "float", images)
        assert main(["calibrate", *arguments, "--output_dir", str(tmp_path / "int8")]) == 0
        assert "accuracy" not in capsys.readouterr().out
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "int8")
        assert loaded.config.id2label == {0: "light", 1: "dark"}

    def test_random_weights_are_not_measured(self, folder, capsys):
        assert main(["evaluate", *options(folder, "body", as_jsonl(folder, "n.jsonl", {"light": 0, "dark": 1}))]) == 2
        assert "classifier.bias, classifier.weight" in capsys.readouterr().err
