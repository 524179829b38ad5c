"""Detection at the command line: its measure against figures worked out by hand, and the commands that print it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_qat.cli.main import main
from hf_qat.cli.tasks import detection
from hf_qat.cli.tasks.detection import mean_average_precision, metrics
from hf_qat.errors import ConfigError
from tests.commands import data_sets_cached_in, one_step
from tests.models import tiny_yolos


def truth(image: int, box: tuple, category: int = 0) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}


def found(image: int, box: tuple, score: float, category: int = 0) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


SQUARE = (10.0, 10.0, 40.0, 40.0)
ELSEWHERE = (60.0, 60.0, 30.0, 30.0)


class TestMeanAveragePrecision:
    """COCO reads precision at the 101 recalls 0, 0.01, …, 1."""

    def test_each_object_found_in_place_is_one(self):
        objects = [truth(1, SQUARE), truth(2, ELSEWHERE, 1)]
        detections = [found(1, SQUARE, 0.9), found(2, ELSEWHERE, 0.8, 1)]
        assert mean_average_precision(objects, detections, 2) == {"map": pytest.approx(1), "map_50": pytest.approx(1)}

    def test_half_of_the_objects_found_reach_the_recalls_up_to_a_half(self):
        found_half = mean_average_precision([truth(1, SQUARE), truth(2, SQUARE)], [found(1, SQUARE, 0.9)], 2)
        assert found_half["map"] == pytest.approx(51 / 101)

    def test_a_better_scored_mistake_halves_precision(self):
        detections = [found(1, ELSEWHERE, 0.9), found(1, SQUARE, 0.8)]
        assert mean_average_precision([truth(1, SQUARE)], detections, 1)["map"] == pytest.approx(1 / 2)

    def test_an_overlap_of_three_fifths_counts_at_two_of_the_ten_thresholds(self):
        """0.5 and 0.55, as it is just below 0.6."""
        detections = [found(1, (10.0, 10.0, 40.0, 23.9), 0.9)]
        measured = mean_average_precision([truth(1, SQUARE)], detections, 1)
        assert measured == {"map": pytest.approx(0.2), "map_50": pytest.approx(1)}

    def test_a_box_of_another_class_is_none(self):
        assert mean_average_precision([truth(1, SQUARE)], [found(1, SQUARE, 0.9, 1)], 1)["map"] == 0

    def test_no_detection_at_all_is_none(self):
        assert mean_average_precision([truth(1, SQUARE)], [], 1) == {"map": 0, "map_50": 0}

    def test_without_an_object_there_is_nothing_to_measure_by(self):
        """COCO would say -1."""
        with pytest.raises(ConfigError, match="nothing to measure by"):
            mean_average_precision([], [found(1, SQUARE, 0.9)], 1)

    def test_it_prints_nothing(self, capsys):
        mean_average_precision([truth(1, SQUARE)], [found(1, SQUARE, 0.9)], 1)
        assert not capsys.readouterr().out


@pytest.mark.parametrize("scores", ["softmax with no object", "sigmoid"])
def test_outputs_in_batches_are_measured_in_pixels_of_each_image(scores):
    """Two batches; the first image is found, of the second one the box is right and the class is not."""
    softmax = scores != "sigmoid"
    family = transformers.YolosImageProcessorPil if softmax else transformers.RTDetrImageProcessorPil
    logits = np.full((1, 1, 3 if softmax else 2), -9.0, np.float32)
    logits[..., 0] = 9.0
    box = np.array([[[0.5, 0.5, 0.2, 0.4]]], np.float32)

    def label(category: int, height: int, width: int) -> dict:
        return {
            "boxes": box[0],
            "class_labels": np.array([category]),
            "orig_size": np.array([height, width]),
        }

    prediction = SimpleNamespace(
        predictions=[(logits, box), (logits, box)], label_ids=[[label(0, 50, 200)], [label(1, 120, 80)]]
    )
    assert metrics(family(), prediction)["map"] == pytest.approx(1 / 2)  # of one class all, of the other none


GOOD = {"bbox": [[8, 8, 16, 16]], "category": [1]}


class TestObjects:
    def classes_of(self, *objects: object) -> tuple[str, ...]:
        data = datasets.Dataset.from_list([{"objects": each} for each in objects])
        return detection.classes(None, data, "objects").names

    def test_a_list_of_objects_means_the_same_as_a_list_of_each_of_their_fields(self):
        listed = [{"bbox": [8, 8, 16, 16], "category": 1}, {"bbox": [0, 0, 4, 4], "category": 0}]
        assert self.classes_of(listed) == ("0", "1")
        wanted = {"bbox": [[8, 8, 16, 16], [0, 0, 4, 4]], "category": [7, 6]}
        assert detection.renumbered(listed, lambda number: number + 6) == wanted

    @pytest.mark.parametrize("nothing", [None, {"bbox": [], "category": []}, {"bbox": None, "category": None}])
    def test_an_image_may_have_none(self, nothing):
        assert self.classes_of(GOOD, nothing) == ("0", "1")
        assert detection.renumbered(nothing, int) == {"bbox": [], "category": []}

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"bbox": [[8, 8, 16]], "category": [1]}, r"image 2 has a box \[8, 8, 16\]"),
            ({"bbox": [[8, 8, -1, 4]], "category": [1]}, r"image 2 has a box \[8, 8, -1, 4\]"),
            ({"bbox": [[8, 8, None, 4]], "category": [1]}, "image 2 has a box"),
            ({"bbox": [[8, 8, 4, 4]], "category": [1, 0]}, "image 2 has 1 boxes and 2 categories"),
            ({"bbox": [[8, 8, 4, 4]]}, "image 2 has 1 boxes and 0 categories"),
        ],
    )
    def test_what_is_no_object_is_said_with_the_number_of_its_image(self, wrong, words):
        with pytest.raises(ConfigError, match=words):
            self.classes_of(GOOD, wrong)

    def test_other_names_and_shares_of_an_image_are_refused(self):
        with pytest.raises(ConfigError, match="with bbox and category, and has bbox, label"):
            self.classes_of({"bbox": [[8, 8, 16, 16]], "label": [1]})
        with pytest.raises(ConfigError, match="in pixels, not in shares"):
            self.classes_of({"bbox": [[0.1, 0.1, 0.5, 0.5]], "category": [1]})

    def test_corners_in_the_place_of_sizes_are_warned_of(self, monkeypatch):
        said: list[str] = []
        monkeypatch.setattr(detection.logger, "warning_once", said.append)
        image = Image.new("RGB", (32, 24))
        detection.warn_of_boxes_outside(image, {"bbox": [[8, 8, 24, 16.5]], "category": [0]})
        assert not said
        detection.warn_of_boxes_outside(image, {"bbox": [[16, 8, 32, 16]], "category": [0]})
        assert len(said) == 1 and "not two corners" in said[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`photos/` with twelve images, each with one square in its middle, and `float/` with a YOLOS that says so.

    Whatever it sees, its two queries say: class 0, the middle half of the image.
    """
    root = tmp_path_factory.mktemp("detection")
    (root / "photos").mkdir()
    lines = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 80, (32, 32, 3)).astype(np.uint8)
        pixels[8:24, 8:24] = 200
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "objects": {"bbox": [[8, 8, 16, 16]], "category": [number % 2]}})
    (root / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    model = tiny_yolos(2, 2)
    for last, bias in (
        (model.class_labels_classifier.layers[-1], [4.0, -4.0, -4.0]),
        (model.bbox_predictor.layers[-1], [0.0, 0.0, 0.0, 0.0]),
    ):
        torch.nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor(bias)
    model.save_pretrained(root / "float")
    transformers.YolosImageProcessorPil(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(root / "float")
    with data_sets_cached_in(root):
        yield root


def options(folder: Path, model: str) -> list[str]:
    names = {"--model_name_or_path": folder / model, "--dataset_name": folder / "photos", "--task": "object-detection"}
    return [str(word) for option in {**names, "--train_val_split": 0.5}.items() for word in option]


def expected(folder: Path) -> float:
    """What the constant answer is worth on the six images that the command draws.

    All scores are one, so detections count in the order of the images, two of each image: right where its class is 0
    and it is the first one, wrong else. The other class is never named. Precision at a recall is the best at that
    recall or a higher one.
    """
    images = datasets.load_dataset("imagefolder", data_dir=str(folder / "photos"))["train"]
    classes = [objects["category"][0] for objects in images.train_test_split(0.5, seed=0)["test"]["objects"]]
    right = [hit for kind in classes for hit in (kind == 0, False)]
    hits, seen = np.cumsum(right), np.arange(1, len(right) + 1)
    assert 0 < hits[-1] < len(classes)
    precision = [(hits / seen)[hits / hits[-1] >= recall - 1e-9].max() for recall in np.linspace(0, 1, 101)]
    return float(np.mean(precision)) / 2


@pytest.mark.filterwarnings("ignore")
def test_evaluate_prints_the_mean_average_precision_of_a_float_model(folder, capsys):
    assert main(["evaluate", *options(folder, "float"), "--batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    measured = json.loads(printed[printed.index("{") :])
    assert measured["map"] == pytest.approx(measured["map_50"]) == pytest.approx(expected(folder))
    assert measured["loss"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_train_reports_it_at_each_stage_and_evaluate_measures_the_file(folder, capsys):
    assert main(["train", *options(folder, "float"), *one_step(folder / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "map_50" in line and line.startswith("  ")]
    assert len(lines) == 4
    assert all(f"map {expected(folder):.4g}," in line for line in lines)
    assert "onnx" in lines[-1] and "ONNX Runtime" in lines[-1]
    assert main(["evaluate", *options(folder, "out/export/onnx/model.onnx")]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["map"] == pytest.approx(expected(folder))


@pytest.mark.parametrize("command", ["train", "evaluate", "calibrate"])
def test_without_pycocotools_a_line_says_what_to_install(command, folder, tmp_path, capsys, monkeypatch):
    def lacking(name: str) -> object:
        return None if name == "pycocotools" else importlib.util.find_spec(name)

    monkeypatch.setattr(detection, "find_spec", lacking)
    more = [] if command == "evaluate" else ["--output_dir", str(tmp_path / "out")]
    assert main([command, *options(folder, "float"), *more]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1 and 'pip install "hf_qat[detection]"' in said[0]
    assert not (tmp_path / "out").exists()
