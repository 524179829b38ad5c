"""The demo's parts. Its whole run, which takes minutes, is `make demo`."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hf_qat.cli import demo
from hf_qat.cli.demo import run as demo_run
from hf_qat.cli.demo.digits import Task, digits_dataset, make_processor, make_task
from hf_qat.cli.demo.report import Row, save, summary, table
from hf_qat.cli.demo.training import accuracy, make_model, train_float
from hf_qat.errors import HfQatError


@pytest.fixture(scope="module")
def digits():
    return digits_dataset(seed=0)


@pytest.fixture(scope="module")
def small_task():
    """128 images to train on and 40 to test."""
    task = make_task(make_processor(), seed=0)
    return Task(task.train.select(range(128)), task.test.select(range(40)), task.pixels[:40], task.labels[:40])


def grey(image: Image.Image) -> bytes:
    return np.asarray(image).tobytes()


def row(target: str, stage: str, trainer: float, **changes) -> Row:
    figures = {"converted": trainer, "plain": trainer, "optimized": trainer, "agreement": 100.0, "size": 540_000}
    return Row(target, stage, trainer, file=f"out/{target}/{stage}.onnx", **{**figures, **changes})


# The data


def test_images_are_8x8_grey_and_three_in_ten_are_for_the_test(digits):
    assert {name: len(part) for name, part in digits.items()} == {"train": 1257, "test": 540}
    for part in digits.values():
        assert part.column_names == ["image", "label"]
        assert {(image.mode, image.size) for image in part["image"]} == {("L", (8, 8))}


def test_every_image_of_scikit_learn_is_in_one_of_both_parts_with_its_label(digits):
    """Counted with multiplicity, so that neither part can hold an image of the other."""
    source = load_digits()
    # 16 levels stretched to 255, half to even as in `np.round`: 15.9375 a level.
    levels = [round(level * 255 / 16) for level in range(17)]
    wanted = Counter(
        (bytes(levels[int(value)] for value in image.flatten()), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    )
    found = Counter(
        (grey(image), label)
        for part in digits.values()
        for image, label in zip(part["image"], part["label"], strict=True)
    )
    assert found == wanted


def test_each_class_has_its_share_of_the_test_set(digits):
    whole, test = Counter(load_digits().target.tolist()), Counter(digits["test"]["label"])
    for label, count in whole.items():
        assert abs(test[label] - count * 540 / 1797) <= 1


def test_the_split_follows_the_seed(digits):
    first = [grey(image) for image in digits["test"]["image"]]
    assert [grey(image) for image in digits_dataset(seed=0)["test"]["image"]] == first
    assert [grey(image) for image in digits_dataset(seed=1)["test"]["image"]] != first


# The processor


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Enlarge a square image: pixels lie at half-integers, and what would lie outside has no weight."""
    positions = (np.arange(size) + 0.5) * len(image) / size
    weights = np.maximum(0, 1 - abs(np.arange(len(image)) + 0.5 - positions[:, None]))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ image @ weights.T


def test_the_processor_enlarges_bilinearly_to_three_channels_from_minus_1_to_1(digits):
    images = digits["train"]["image"][:20]
    pixels = make_processor()(images, return_tensors="np")["pixel_values"]
    assert pixels.shape == (20, 3, 32, 32) and pixels.dtype == np.float32
    wanted = [bilinear(np.asarray(image, dtype=np.float64), 32) / 127.5 - 1 for image in images]
    # PIL rounds to whole grey levels, once along each axis.
    np.testing.assert_allclose(pixels, np.repeat(np.array(wanted)[:, None], 3, axis=1), atol=1.01 / 127.5)


@pytest.mark.parametrize(("level", "value"), [(0, -1.0), (255, 1.0), (51, -0.6)])
def test_an_even_image_stays_even(level, value):
    pixels = make_processor()(Image.new("L", (8, 8), level), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, value, atol=1e-6)


def test_a_task_holds_what_the_model_takes(small_task):
    batch = small_task.test[:40]
    assert set(batch) == {"pixel_values", "labels"}
    torch.testing.assert_close(batch["pixel_values"], small_task.pixels)
    assert batch["labels"] == small_task.labels.tolist()


# The float model


def test_the_model_follows_the_seed_and_leaves_other_random_numbers_alone():
    before = torch.get_rng_state()
    first, same, other = (make_model(seed).state_dict()["classifier.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_knows_the_digits_by_name():
    config = make_model(0).config
    assert config.id2label == {digit: str(digit) for digit in range(10)}
    assert config.label2id == {str(digit): digit for digit in range(10)}


def test_accuracy_is_the_share_of_right_answers_in_percent():
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 3.0], [5.0, 4.0]])
    assert accuracy(logits, np.array([1, 0, 0, 0])) == 75.0


def test_a_short_float_training_moves_the_weights_and_reports_the_accuracy_of_the_model(small_task, tmp_path, capsys):
    model, reached = train_float(small_task, tmp_path, seed=0, epochs=2)
    assert not torch.equal(model.classifier.weight, make_model(0).classifier.weight)
    assert not model.training
    with torch.no_grad():
        answers = model(pixel_values=small_task.pixels).logits.argmax(dim=-1).numpy()
    assert reached == pytest.approx(100 * np.mean(answers == small_task.labels))
    assert capsys.readouterr().out == ""


# The report


def test_the_table_has_a_line_for_each_model_with_all_of_its_figures():
    rows = [
        row("float", "float", 98.15, converted=None, agreement=None, size=1_520_000),
        row("int8", "QAT", 97.41, converted=97.22, plain=97.04, optimized=96.85, agreement=99.63),
    ]
    *_, first, second = table(rows).splitlines()
    assert first.replace("|", " ").split() == ["float", "98.15", "-", "98.15", "98.15", "-", "1.52", rows[0].file]
    figures = ["97.41", "97.22", "97.04", "96.85", "99.63", "0.54"]
    assert second.replace("|", " ").split() == ["int8,", "QAT", *figures, rows[1].file]


def test_the_columns_of_the_table_stand_below_each_other():
    rows = [row("float", "float", 8.15, converted=None, agreement=None), row("TDA4VM-w4", "calibrated", 100.0)]
    lines = [line for line in table(rows).splitlines() if "|" in line]
    assert len({tuple(k for k, character in enumerate(line) if character == "|") for line in lines}) == 1


def test_the_summary_says_how_much_of_the_loss_training_won_back():
    rows = [row("float", "float", 98.0), row("hard", "calibrated", 88.0), row("hard", "QAT", 95.5)]
    assert summary(rows) == "hard: calibration lost 10.00 points, training won 75% of them back."


def test_the_summary_does_not_claim_more_than_all_of_the_loss():
    rows = [row("float", "float", 98.0), row("hard", "calibrated", 88.0), row("hard", "QAT", 98.5)]
    assert summary(rows) == "hard: calibration lost 10.00 points, training won all of them back (+0.50)."


def test_the_summary_says_where_calibration_is_enough():
    rows = [row("float", "float", 98.0), row("easy", "calibrated", 97.8), row("easy", "QAT", 98.4)]
    assert summary(rows) == "easy: calibration is good enough (-0.20 points; after training, +0.40)."


def test_the_saved_results_are_the_rows_and_the_seed(tmp_path):
    save([row("int8", "QAT", 97.41, converted=None)], 3, tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results["seed"] == 3
    assert results["rows"][0]["trainer"] == 97.41 and results["rows"][0]["converted"] is None


# The command


def test_missing_packages_are_named_with_the_line_to_type(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda module: None if module in {"sklearn", "onnxruntime"} else module)
    with pytest.raises(HfQatError) as raised:
        demo.main([])
    assert "scikit-learn, onnxruntime" in str(raised.value)
    assert 'pip install "hf_qat[demo]"' in str(raised.value)


def test_an_output_that_is_a_file_is_refused_before_any_training(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_run, "make_task", lambda *_: pytest.fail("time was spent"))
    (tmp_path / "file").write_text("something of value")
    with pytest.raises(OSError, match="file"):
        demo.main(["--output", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "something of value"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--epochs", "0"], "0 is less than 1"), (["--seed", "-1"], "-1 is less than 0"), (["--seed", "x"], "'x'")],
    ids=["no epochs", "negative seed", "no number"],
)
def test_an_impossible_option_is_refused_with_its_value(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
