"""Depth at the command line: loss and measures against numpy and transformers, and the commands that print them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.glpn.modeling_glpn import SiLogLoss

from hf_qat.cli.main import main
from hf_qat.cli.tasks import depth
from hf_qat.errors import ConfigError
from tests.commands import data_sets_cached_in, last_json, one_step


class Pixels:
    """In the place of an image processor: images of a height and width, whatever comes in."""

    def __init__(self, height: int, width: int) -> None:
        self.size = (height, width)

    def __call__(self, images: list, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(len(images), 3, *self.size)}


def encoded(values: np.ndarray, height: int = 2, width: int = 2) -> torch.Tensor:
    return depth.encode(Pixels(height, width), ["image"], [Image.fromarray(values)])["labels"][0]


class TestDepthMaps:
    def test_integers_of_16_bits_are_millimetres(self):
        found = encoded(np.array([[0, 500], [1234, 65535]], np.uint16))
        assert torch.equal(found, torch.tensor([[0, 0.5], [1.234, 65.535]]))

    def test_floating_point_is_as_it_is_and_what_is_no_distance_is_unknown(self):
        found = encoded(np.array([[0.25, -1.0], [np.nan, np.inf]], np.float32))
        assert torch.equal(found, torch.tensor([[0.25, 0], [0, 0]]))

    def test_no_distance_is_made_up_where_a_map_is_resized(self):
        values = np.kron(np.array([[1.0, 8.0], [0.0, 3.0]], np.float32), np.ones((3, 5), np.float32))
        assert torch.equal(encoded(values), torch.tensor([[1.0, 8.0], [0.0, 3.0]]))

    @pytest.mark.parametrize(
        ("values", "words"), [(np.zeros((2, 2), np.uint8), "8 bits"), (np.zeros((2, 2, 3), np.uint8), "3 channels")]
    )
    def test_a_picture_of_distances_is_refused(self, values, words):
        with pytest.raises(ConfigError, match=f"{words}.*16 bits in millimetres"):
            encoded(values)


@pytest.fixture
def estimates() -> tuple[np.ndarray, np.ndarray]:
    """(3, 4, 6) estimates, and distances with some unknown; nothing is known of the last."""
    generator = np.random.default_rng(0)
    truth = generator.uniform(0.5, 9.0, (3, 4, 6)).astype(np.float32)
    estimated = (truth * generator.uniform(0.6, 1.5, truth.shape)).astype(np.float32)
    truth[generator.random(truth.shape) < 0.3] = 0
    truth[2] = 0
    return estimated, truth


class TestMeasures:
    def test_they_are_means_over_images_of_numpy_s(self, estimates):
        estimated, truth = estimates
        delta, relative, squares = [], [], []
        for x, y in zip(estimated[:2], truth[:2], strict=True):
            x, y = x[y > 0].astype(np.float64), y[y > 0].astype(np.float64)
            delta.append(np.mean(np.maximum(x / y, y / x) < 1.25))
            relative.append(np.mean(np.abs(x - y) / y))
            squares.append(np.sqrt(np.mean((x - y) ** 2)))
        found = depth.metrics(None, SimpleNamespace(predictions=estimated, label_ids=truth))
        wanted = {"delta_1": np.mean(delta), "abs_rel": np.mean(relative), "rmse": np.mean(squares)}
        assert found == pytest.approx(wanted, rel=1e-12)
        assert 0.1 < found["delta_1"] < 0.9

    def test_a_figure_worked_out_by_hand(self):
        """4 m for 5 m is just not near (5 / 4 = 1.25), 4 m for 4 m is, 0 m for 2 m is not, and the last is unknown."""
        prediction = SimpleNamespace(
            predictions=(np.array([[[4.0, 4.0], [0.0, 7.0]]]), None), label_ids=np.array([[[5.0, 4.0], [2.0, 0.0]]])
        )
        found = depth.metrics(None, prediction)
        assert found == pytest.approx({"delta_1": 1 / 3, "abs_rel": 1.2 / 3, "rmse": (5 / 3) ** 0.5})

    def test_estimates_of_another_size_are_brought_to_that_of_the_truth(self):
        prediction = SimpleNamespace(predictions=np.full((1, 2, 2), 3.0), label_ids=np.full((1, 8, 6), 3.0))
        assert depth.metrics(None, prediction) == {"delta_1": 1, "abs_rel": 0, "rmse": 0}

    def test_nothing_known_at_all_is_an_error(self):
        with pytest.raises(ConfigError, match="nothing to measure by"):
            depth.metrics(None, SimpleNamespace(predictions=np.ones((1, 2, 2)), label_ids=np.zeros((1, 2, 2))))


class TestLoss:
    def test_it_is_the_square_of_glpn_s(self, estimates):
        estimated, truth = (torch.tensor(values[:2], requires_grad=k == 0) for k, values in enumerate(estimates))
        (wanted,) = torch.autograd.grad(SiLogLoss()(estimated, truth).square(), estimated)
        found = depth.loss(SimpleNamespace(predicted_depth=estimated), truth)
        torch.testing.assert_close(found, SiLogLoss()(estimated, truth).square())
        torch.testing.assert_close(torch.autograd.grad(found, estimated)[0], wanted)

    def test_a_batch_without_any_distance_teaches_nothing(self):
        estimated = torch.ones(1, 2, 2, requires_grad=True)
        found = depth.loss(SimpleNamespace(predicted_depth=estimated), torch.zeros(1, 2, 2))
        found.backward()
        assert found == 0 and torch.equal(estimated.grad, torch.zeros(1, 2, 2))

    def test_losses_of_a_step_add_up_to_their_mean(self, estimates):
        """Two batches in one step: each is half of it."""
        estimated, truth = map(torch.tensor, estimates)
        parts = [SimpleNamespace(predicted_depth=each[None]) for each in estimated[:2]]
        alone = [depth.loss(part, each[None]) for part, each in zip(parts, truth, strict=False)]
        items = truth[:2].numel()
        shares = [depth.loss(part, each[None], items) for part, each in zip(parts, truth, strict=False)]
        torch.testing.assert_close(sum(shares), torch.stack(alone).mean())


#: Metres: the answer of the model below whatever it sees, and what is right in the left and the right half.
SAID, LEFT, RIGHT = 5.0, 4.5, 8.0


def expected() -> dict[str, float]:
    """What the constant answer is worth on every image: the left half is near."""
    errors = np.array([SAID - LEFT, SAID - RIGHT])
    relative = np.abs(errors) / [LEFT, RIGHT]
    return {"delta_1": 0.5, "abs_rel": float(relative.mean()), "rmse": float(np.sqrt((errors**2).mean()))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight images with depth maps in `photos.jsonl`, and `float/` with a GLPN that says 5 m everywhere."""
    root = tmp_path_factory.mktemp("depth")
    (root / "photos").mkdir()
    lines = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
        distances = np.full((32, 32), 1000 * LEFT, np.uint16)
        distances[:, 16:] = 1000 * RIGHT
        distances[:4] = 0  # unknown
        Image.fromarray(distances).save(root / "photos" / f"{number}_depth.png")
        lines.append({"image": f"photos/{number}.png", "depth": f"photos/{number}_depth.png"})
    (root / "photos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    config = transformers.GLPNConfig(**sizes, sr_ratios=[1, 1, 1, 1], decoder_hidden_size=8, drop_path_rate=0.0)
    model = transformers.GLPNForDepthEstimation(config)
    for layer in (module for module in model.head.modules() if isinstance(module, torch.nn.Conv2d)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)  # the sigmoid of 0, of at most 10 m
    model.save_pretrained(root / "float")
    transformers.GLPNImageProcessorPil().save_pretrained(root / "float")
    with data_sets_cached_in(root):
        yield root


def options(folder: Path, model: str, data: str = "photos.jsonl") -> list[str]:
    names = {"--model_name_or_path": folder / model, "--dataset_name": folder / data, "--task": "depth-estimation"}
    return [str(word) for option in {**names, "--train_val_split": 0.5}.items() for word in option]


@pytest.mark.filterwarnings("ignore")
def test_evaluate_prints_what_a_constant_answer_is_worth(folder, capsys):
    assert main(["evaluate", *options(folder, "float"), "--batch_size", "3"]) == 0
    measured = last_json(capsys.readouterr().out)
    logarithms = np.log(SAID / np.array([LEFT, RIGHT]))
    assert measured.pop("loss") == pytest.approx((logarithms**2).mean() - logarithms.mean() ** 2 / 2, rel=1e-5)
    assert measured == pytest.approx(expected(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_train_reports_it_at_each_stage_and_evaluate_measures_the_file(folder, tmp_path, capsys):
    """A step at a rate of 0: what the last convolution says, 0, has a code, so int8 says 5 m too, to a step of it."""
    assert main(["train", *options(folder, "float"), *one_step(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "abs_rel" in line and line.startswith("  ")]
    assert len(lines) == 4 and "ONNX Runtime" in lines[-1]
    assert "delta_1 0.5, " in lines[0] and f"abs_rel {expected()['abs_rel']:.4g}" in lines[0]
    file = tmp_path / "out/export/onnx/model.onnx"
    assert main(["evaluate", *options(folder, str(file))]) == 0
    measured = last_json(capsys.readouterr().out)
    assert {name: measured[name] for name in expected()} == pytest.approx(expected(), abs=0.05)
    assert main(["export", str(tmp_path / "out/export"), str(tmp_path / "a.onnx"), "--task", "depth-estimation"]) == 0


@pytest.mark.filterwarnings("ignore")
def test_trainer_learns_by_the_loss(folder, tmp_path):
    """Of constant answers the geometric mean is best: its logarithm is that of the distances, in the mean."""
    model = transformers.GLPNForDepthEstimation.from_pretrained(folder / "float")
    truth = torch.full((32, 32), LEFT)
    truth[:, 16:] = RIGHT
    rows = [{"pixel_values": torch.rand(3, 32, 32), "labels": truth} for _ in range(4)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=0.05, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    transformers.Trainer(
        model, args, train_dataset=rows, data_collator=depth.collate, compute_loss_func=depth.loss
    ).train()
    found = model.eval()(rows[0]["pixel_values"][None]).predicted_depth
    assert found.mean().item() == pytest.approx((LEFT * RIGHT) ** 0.5, rel=0.03)  # the arithmetic mean is 4 % more


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_calibrate_needs_no_depth(folder, tmp_path, capsys):
    arguments = [*options(folder, "float", "photos"), "--output_dir", str(tmp_path / "int8"), "--batch_size", "4"]
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.png").symlink_to(folder / "photos" / f"{number}.png")
    arguments[arguments.index("--dataset_name") + 1] = str(images)
    assert main(["calibrate", *arguments]) == 0
    assert "abs_rel" not in capsys.readouterr().out
    assert (tmp_path / "int8" / "onnx" / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dry_run_of_depth_names_no_classes(folder, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "out"), "--dry_run", "--use_cpu"]
    assert main(["train", *options(folder, "float"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "4 images to train on, 4 to evaluate on\n" in printed and "classes" not in printed
