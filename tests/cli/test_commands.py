"""The commands as a new user types them: two folders of pictures, a tiny float model, everything on the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image

from hf_qat.cli.main import main
from hf_qat.cli.train import check_best
from hf_qat.errors import ConfigError
from tests.commands import data_sets_cached_in


def draw(kind: str, generator: np.random.Generator) -> Image.Image:
    pixels = generator.integers(0, 80, (32, 32, 3)).astype(np.uint8)
    if kind == "stripes":
        pixels[:, ::4] = generator.integers(150, 255)
    else:
        pixels[::6, ::6] = pixels[1::6, ::6] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`photos/` with two classes, `float/` with a model; data sets are cached in it, too."""
    root, generator = tmp_path_factory.mktemp("commands"), np.random.default_rng(0)
    for kind in ("dots", "stripes"):
        (root / "photos" / kind).mkdir(parents=True)
        for number in range(40):
            draw(kind, generator).save(root / "photos" / kind / f"{number}.png")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=2
    )
    transformers.ResNetForImageClassification(config).save_pretrained(root / "float")
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0)
    processor.save_pretrained(root / "float")
    with data_sets_cached_in(root):
        yield root


@pytest.fixture
def model(folder: Path) -> list[str]:
    return ["--model_name_or_path", str(folder / "float"), "--dataset_name", str(folder / "photos")]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """What `hf-qat train` has written."""
    arguments = ["--model_name_or_path", folder / "float", "--dataset_name", folder / "photos", "--target", "AM68A"]
    arguments += ["--output_dir", folder / "out", "--num_train_epochs", "4", "--learning_rate", "5e-3", "--use_cpu"]
    arguments += ["--save_strategy", "no", "--logging_steps", "5", "--disable_tqdm", "True", "--report_to", "none"]
    assert main(["train", *map(str, arguments)]) == 0
    return folder / "out"


@pytest.mark.filterwarnings("ignore")
class TestTrain:
    def test_it_leaves_a_checkpoint_a_file_a_bundle_a_card_and_a_report(self, trained):
        written = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
        wanted = {"export/model.safetensors", "export/onnx/model.onnx", "export/README.md", "report.html"}
        assert wanted <= written
        assert any(name.startswith("export/tidl/AM68A/") for name in written)

    def test_the_checkpoint_knows_the_names_of_the_folders(self, trained):
        config = json.loads((trained / "export/config.json").read_text())
        assert config["id2label"] == {"0": "dots", "1": "stripes"}

    def test_the_report_has_accuracy_training_layers_and_files_and_needs_no_network(self, trained):
        text = (trained / "report.html").read_text(encoding="utf-8")
        for name in ("accuracy", "training", "figure", "layers", "files"):
            assert f'id="{name}"' in text
        assert "AM68A" in text and "model.safetensors" in text
        assert not re.search(r'(src|href)="http', text) and len(text) < 3_000_000

    def test_evaluate_on_the_file_gives_what_onnx_runtime_gives(self, trained, folder, capsys):
        """Over all pictures, run here by hand."""
        file = trained / "export/onnx/model.onnx"
        arguments = ["--model_name_or_path", str(file), "--dataset_name", str(folder / "photos")]
        assert main(["evaluate", *arguments, "--train_val_split", "0.5"]) == 0
        printed = capsys.readouterr().out
        found = json.loads(printed[printed.index("{") :])["accuracy"]
        processor = transformers.AutoImageProcessor.from_pretrained(trained / "export")
        images = datasets.load_dataset("imagefolder", data_dir=str(folder / "photos"))["train"]
        images = images.train_test_split(0.5, seed=0)["test"]
        pixels = processor([image.convert("RGB") for image in images["image"]], return_tensors="np")["pixel_values"]
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        logits = session.run(None, {session.get_inputs()[0].name: pixels})[0]
        assert found == pytest.approx((logits.argmax(1) == np.array(images["label"])).mean())

    def test_all_four_stages_are_in_the_report(self, trained):
        text = (trained / "report.html").read_text(encoding="utf-8")
        rows = re.search(r'id="accuracy">(.*?)</table>', text, re.DOTALL)[1]
        assert rows.count("<tr>") == 5 and "ONNX Runtime" in rows

    def test_export_and_check_take_what_it_made(self, trained, tmp_path, capsys):
        assert main(["export", str(trained / "export"), str(tmp_path / "again.onnx")]) == 0
        assert "opset 17" in capsys.readouterr().out
        assert main(["check", str(tmp_path / "again.onnx"), "--target", "AM68A"]) == 0

    @pytest.mark.slow
    def test_analyze_compares_it_with_itself(self, trained, folder, tmp_path, capsys):
        arguments = ["--model_name_or_path", str(trained / "export"), "--dataset_name", str(folder / "photos")]
        assert main(["analyze", *arguments, "--html", str(tmp_path / "a.html")]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        weights = [float(line[4].replace("exact", "inf")) for line in lines if len(line) == 10 and line[1] == "conv2d"]
        assert len(weights) == 7 and min(weights) > 60
        assert (tmp_path / "a.html").is_file()

    def test_analyze_takes_the_file_too(self, trained, folder, capsys):
        file = trained / "export/onnx/model.onnx"
        assert main(["analyze", str(file), "--dataset_name", str(folder / "photos"), "--num_batches", "2"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert sum(len(line) == 10 and line[1] == "Conv" for line in lines) == 7
        reference = ["--reference", str(folder / "photos")]
        assert main(["analyze", str(file), "--dataset_name", str(folder / "photos"), *reference]) == 2
        assert "hf-qat analyze: error: cannot read" in capsys.readouterr().err

    @pytest.mark.slow
    def test_it_goes_on_from_the_newest_checkpoint_and_exports_in_the_place_of_before(self, folder, tmp_path, capsys):
        """Two of three epochs are behind it."""
        arguments = ["--model_name_or_path", folder / "float", "--dataset_name", folder / "photos", "--use_cpu"]
        arguments += ["--output_dir", tmp_path / "out", "--report_to", "none", "--disable_tqdm", "True"]
        assert main(["train", *map(str, arguments), "--num_train_epochs", "2"]) == 0
        capsys.readouterr()
        resumed = [*map(str, arguments), "--num_train_epochs", "3", "--resume_from_checkpoint"]
        assert main(["train", *resumed, "True"]) == 0
        logged = re.findall(r"'loss': .*'epoch': '([\d.]+)'", capsys.readouterr().out)
        assert logged and 2 < min(map(float, logged)) <= max(map(float, logged)) == 3
        assert (tmp_path / "out/checkpoint-27").is_dir()
        assert main(["train", *resumed, str(tmp_path / "out" / "checkpoint-99")]) == 2
        assert "checkpoint-99 is no checkpoint to resume from" in capsys.readouterr().err

    def test_quantized_models_are_refused_in_words_of_the_command_line(self, trained, folder, tmp_path, capsys):
        arguments = ["--dataset_name", str(folder / "photos"), "--output_dir", str(tmp_path / "out")]
        assert main(["calibrate", "--model_name_or_path", str(trained / "export"), *arguments]) == 2
        assert "export is quantized already, for inference only: give the float model" in capsys.readouterr().err
        assert main(["export", str(folder / "float"), str(tmp_path / "model.onnx")]) == 2
        assert "float is a float model, and only an int8 checkpoint" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_a_directory_that_cannot_be_replaced_is_said_before_the_images_are_read(command, folder, tmp_path, capsys):
    export = tmp_path / "export" if command == "train" else tmp_path
    export.mkdir(exist_ok=True)
    (export / "mine.txt").write_text("mine")
    arguments = ["--model_name_or_path", str(folder / "float"), "--dataset_name", str(folder / "no/such/folder")]
    assert main([command, *arguments, "--output_dir", str(tmp_path)]) == 2
    assert f"{export} is not empty" in capsys.readouterr().err


def test_there_is_nothing_to_resume_from_in_a_new_directory(model, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "True"]
    assert main(["train", *model, *arguments]) == 2
    assert "out has no checkpoint to resume from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(model, folder, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "out"), "--dry_run", "--num_train_epochs", "2", "--use_cpu"]
    assert main(["train", *model, *arguments, "--per_device_train_batch_size", "17"]) == 0
    printed = capsys.readouterr().out
    assert "8 layers with quantized weights" in printed
    assert "68 images to train on, 12 to evaluate on, 2 classes" in printed and "8 steps of 17 images" in printed
    assert re.search(r"about \d+ seconds of training in float", printed)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_calibrate_needs_no_labels(folder, tmp_path, capsys):
    arguments = ["--model_name_or_path", folder / "float", "--dataset_name", folder / "photos" / "dots"]
    assert main(["calibrate", *map(str, arguments), "--output_dir", str(tmp_path / "int8")]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert (tmp_path / "int8" / "onnx" / "model.onnx").is_file()
    sums = (tmp_path / "int8" / "SHA256SUMS").read_text().splitlines()
    assert any(line.endswith("  report.html") for line in sums)


def test_a_training_is_logged_and_evaluated_often_enough_for_its_report(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--logging_steps.{0,300}?\(default: 0.05\)", said)
    assert re.search(r"--eval_strategy.{0,400}?\(default: epoch\)", said)


def test_options_come_from_a_file_and_what_is_typed_wins(model, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "target: w4a8\nper_device_train_batch_size: 17\nuse_cpu: true\nexclude: [classifier]\ndry_run: true\n"
    )
    assert main(["train", *model, "--config", str(recipe), "--target", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "for int8" in printed and "of 17 images" in printed and "7 layers" in printed


def test_a_jsonl_file_names_images_beside_it(folder, tmp_path, capsys):
    lines = [
        json.dumps({"image": f"{kind}/{k}.png", "label": kind}) for kind in ("dots", "stripes") for k in range(10)
    ]
    (folder / "photos.jsonl").write_text("\n".join(lines))
    for kind in ("dots", "stripes"):
        if not (folder / kind).exists():
            (folder / kind).symlink_to(folder / "photos" / kind)
    arguments = ["--model_name_or_path", str(folder / "float"), "--dataset_name", str(folder / "photos.jsonl")]
    assert main(["train", *arguments, "--dry_run", "--use_cpu"]) == 0
    assert "17 images to train on, 3 to evaluate on, 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "changed", "words"),
    [
        ("train", {"--target": "AM68"}, "Did you mean 'AM68A'"),
        ("train", {"--weight_bits": "9"}, "bits"),
        ("train", {"--learning_rat": "1"}, "--learning_rat"),
        ("train", {"--exclude": "classifer"}, "classifer"),
        ("train", {"--model_name_or_path": "flot"}, "there is no folder flot"),
        ("evaluate", {"--dataset_name": "no/such/folder"}, "there is no folder and no file no/such/folder"),
        ("evaluate", {"--task": "clasification"}, "Did you mean 'image-classification'"),
        ("evaluate", {"--image_column_name": "picture"}, "it has image, label. Name the right one"),
        ("evaluate", {"--label_column_name": "kind"}, "no column 'kind'"),
        ("evaluate", {"--train_val_split": "1.5"}, "between 0 and 1"),
        ("evaluate", {"--model_name_or_path": "missing.onnx"}, "there is no file missing.onnx"),
        (
            "evaluate",
            {"--dataset_name": "fotos"},
            "there is no folder fotos, and no data set on the Hub could be read",
        ),
        ("train", {"--per_device_train_batch_size": "0"}, "per_device_train_batch_size must be 1 or more, not 0"),
        ("train", {"--config": "cnn_in8"}, "Known recipes: cnn_int8"),
        ("analyze", {"--plot": "figure.xyz", "--model_name_or_path": "flot"}, "cannot draw figure.xyz"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(command, changed, words, folder, tmp_path, capsys):
    options = {"--model_name_or_path": str(folder / "float"), "--dataset_name": str(folder / "photos")}
    options |= {"--output_dir": str(tmp_path / "out"), "--use_cpu": "True"} if command == "train" else {}
    argv = [word for option in (options | changed).items() for word in option]
    assert main([command, *argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"hf-qat {command}: error: ") and words in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_best_model_is_chosen_by_what_is_measured(tmp_path):
    measured = {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 1.0}
    for name in ("accuracy", "eval_loss", None):
        check_best(transformers.TrainingArguments(str(tmp_path), metric_for_best_model=name), measured)
    with pytest.raises(ConfigError, match="'f1', and what is measured is loss, accuracy"):
        check_best(transformers.TrainingArguments(str(tmp_path), metric_for_best_model="f1"), measured)


@pytest.mark.slow
def test_a_metric_that_is_not_measured_is_said_before_training(model, tmp_path, capsys):
    few = ["--max_train_samples", "8", "--max_eval_samples", "4", "--output_dir", str(tmp_path), "--use_cpu"]
    assert main(["train", *model, *few, "--metric_for_best_model", "f1"]) == 2
    assert "metric_for_best_model is 'f1', and what is measured is loss, accuracy." in capsys.readouterr().err


def test_a_library_that_the_processor_needs_is_named_in_one_line(folder, monkeypatch, capsys):
    def missing(*args: object, **options: object) -> None:
        raise ImportError("\nAutoImageProcessor requires the Torchvision library\nbut it was not found.\n")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", missing)
    argv = ["--model_name_or_path", str(folder / "float"), "--dataset_name", str(folder / "photos")]
    assert main(["evaluate", *argv]) == 2
    said = capsys.readouterr().err
    assert "cannot be loaded: AutoImageProcessor requires the Torchvision library but it was not found." in said
