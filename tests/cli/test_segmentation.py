"""Segmentation at the command line: measures against figures worked out by hand, and the commands that print them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from math import e, log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_qat.cli.main import main
from hf_qat.cli.tasks import TASKS, segmentation
from hf_qat.errors import ConfigError
from tests.commands import data_sets_cached_in, last_json, one_step


#: A quarter of what is counted is class 0, a half is class 1, a quarter class 2; the model says 1 everywhere.
EXPECTED = {"mean_iou": 0.5 / 3, "pixel_accuracy": 0.5}


def mask() -> np.ndarray:
    """(32, 32) uint8, with four rows that belong to no class."""
    classes = np.ones((32, 32), np.uint8)
    classes[:, :8], classes[:, 24:] = 0, 2
    classes[:4] = segmentation.IGNORED
    return classes


def test_measures_of_a_map_with_one_pixel_wrong():
    """Class 0 is found in 1 of its 2 pixels, class 1 in its 2 and in 1 more; nothing is known of the last."""
    truth = np.array([[[0, 0, 1], [1, 255, 255]]])
    said = np.array([[[0, 1, 1], [1, 0, 1]]])
    logits = np.moveaxis(np.eye(3, dtype=np.float32)[said], -1, 1)
    for outputs in (torch.tensor(logits), (torch.tensor(logits), None)):
        classes = segmentation.classes_of_pixels(outputs, torch.tensor(truth))
        found = segmentation.metrics(None, SimpleNamespace(predictions=classes.numpy(), label_ids=truth))
        assert found == pytest.approx({"mean_iou": (1 / 2 + 2 / 3) / 2, "pixel_accuracy": 3 / 4})


def test_logits_of_a_coarser_grid_are_brought_to_that_of_the_truth():
    logits = np.zeros((1, 2, 2, 2), np.float32)
    logits[:, 1, :, 1] = 4.0
    logits[:, 0, :, 0] = 4.0
    truth = np.repeat(np.array([[[0, 0, 1, 1]]]), 4, axis=1)
    classes = segmentation.classes_of_pixels(torch.tensor(logits), torch.tensor(truth))
    assert classes.shape == truth.shape and classes.element_size() == 2  # what an evaluation keeps of each pixel
    found = segmentation.metrics(None, SimpleNamespace(predictions=classes.numpy(), label_ids=truth))
    assert found == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


def test_masks_without_a_class_measure_nothing():
    nothing = np.full((1, 2, 2), segmentation.IGNORED)
    with pytest.raises(ConfigError, match="nothing to measure by"):
        segmentation.metrics(None, SimpleNamespace(predictions=np.zeros((1, 2, 2)), label_ids=nothing))


@pytest.mark.parametrize(
    ("values", "words"),
    [(np.zeros((4, 4, 3), np.uint8), "3 channels"), (np.zeros((4, 4), np.float32), "floating-point numbers")],
)
def test_a_mask_that_holds_no_classes_is_named(values, words, tmp_path):
    path = tmp_path / "mask.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ConfigError, match=f"mask.tif: a mask has {words}"):
        segmentation.classes(None, {"label": [{"path": str(path), "bytes": None}]}, "label")


@pytest.mark.parametrize(("size", "fits"), [((48, 32), True), ((24, 16), True), ((32, 48), False), ((48, 48), False)])
def test_a_mask_has_the_shape_of_its_image(size, fits):
    check = TASKS["semantic-segmentation"].check
    with nullcontext() if fits else pytest.raises(ConfigError, match=f"has {size[0]}x{size[1]} pixels.* 48x32"):
        check(Image.new("RGB", (48, 32)), Image.new("L", size))


def test_classes_are_numbers_up_to_the_largest_and_what_is_ignored_is_none():
    pictures = [io.BytesIO(), io.BytesIO()]
    for values, picture in zip([mask(), np.full((2, 2), 255, np.uint8)], pictures, strict=True):
        Image.fromarray(values).save(picture, "png")
    masks = {"label": [{"path": None, "bytes": picture.getvalue()} for picture in pictures]}
    assert segmentation.classes(None, masks, "label").names == ("0", "1", "2")
    reducing = transformers.SegformerImageProcessorPil(do_reduce_labels=True)
    assert segmentation.classes(reducing, masks, "label").names == ("0", "1")  # 0 is no class, 1 and 2 are 0 and 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight images with masks in `photos.jsonl`, and `float/` with a SegFormer that says class 1 everywhere."""
    root, generator = tmp_path_factory.mktemp("segmentation"), np.random.default_rng(0)
    (root / "photos").mkdir()
    for number in range(8):
        Image.fromarray(generator.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(root / f"photos/{number}.png")
        Image.fromarray(mask()).save(root / f"photos/{number}_classes.png")
    names = [{"image": f"photos/{n}.png", "label": f"photos/{n}_classes.png"} for n in range(8)]
    (root / "photos.jsonl").write_text("\n".join(map(json.dumps, names)))
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    config = transformers.SegformerConfig(**sizes, sr_ratios=[1, 1, 1, 1], decoder_hidden_size=8, num_labels=3)
    model = transformers.SegformerForSemanticSegmentation(config)
    torch.nn.init.zeros_(model.decode_head.classifier.weight)
    model.decode_head.classifier.bias.data = torch.tensor([0.0, 1.0, 0.0])
    model.save_pretrained(root / "float")
    processor = transformers.SegformerImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(root / "float")
    with data_sets_cached_in(root):
        yield root


def options(folder: Path, model: str) -> list[str]:
    names = {"--model_name_or_path": folder / model, "--dataset_name": folder / "photos.jsonl"}
    names |= {"--task": "semantic-segmentation", "--train_val_split": "0.5"}
    return [str(word) for option in names.items() for word in option]


@pytest.mark.filterwarnings("ignore")
def test_evaluate_reads_masks_beside_the_file_and_prints_what_one_class_everywhere_is_worth(folder, capsys):
    assert main(["evaluate", *options(folder, "float"), "--batch_size", "3"]) == 0
    measured = last_json(capsys.readouterr().out)
    assert measured.pop("loss") == pytest.approx(log(2 + e) - 0.5, rel=1e-5)  # the cross entropy of logits 0, 1, 0
    assert measured == pytest.approx(EXPECTED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_processor_that_reduces_labels_leaves_a_trained_model_its_head_and_names(folder, tmp_path, capsys):
    """Masks of 1, 2 and 3 with nothing at 0, as those of ADE20K have it, are what the model calls 0, 1 and 2."""
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder / "float")
    model.config.id2label = {0: "sky", 1: "wall", 2: "road"}
    model.save_pretrained(tmp_path / "model")
    size = {"height": 32, "width": 32}
    transformers.SegformerImageProcessorPil(size=size, do_reduce_labels=True).save_pretrained(tmp_path / "model")
    for number in range(8):
        raw = np.where(mask() == segmentation.IGNORED, 0, mask() + 1).astype(np.uint8)
        Image.fromarray(raw).save(tmp_path / f"{number}_classes.png")
    names = [{"image": str(folder / f"photos/{n}.png"), "label": f"{n}_classes.png"} for n in range(8)]
    (tmp_path / "photos.jsonl").write_text("\n".join(map(json.dumps, names)))
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "photos.jsonl")]
    arguments += ["--task", "semantic-segmentation", "--train_val_split", "0.5"]
    assert main(["evaluate", *arguments]) == 0
    measured = last_json(capsys.readouterr().out)
    assert {name: measured[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert main(["calibrate", *arguments, "--output_dir", str(tmp_path / "int8")]) == 0
    assert json.loads((tmp_path / "int8/config.json").read_text())["id2label"] == {
        "0": "sky",
        "1": "wall",
        "2": "road",
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_train_reports_it_at_each_stage_and_evaluate_measures_the_file(folder, tmp_path, capsys):
    assert main(["train", *options(folder, "float"), *one_step(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "mean_iou" in line and line.startswith("  ")]
    assert len(lines) == 4 and "ONNX Runtime" in lines[-1]
    assert all("mean_iou 0.1667" in line and "pixel_accuracy 0.5" in line for line in lines)
    assert main(["evaluate", *options(folder, str(tmp_path / "out/export/onnx/model.onnx"))]) == 0
    measured = last_json(capsys.readouterr().out)
    assert {name: measured[name] for name in EXPECTED} == pytest.approx(EXPECTED)
