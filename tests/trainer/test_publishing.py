"""QATTrainer.export, save_quantized and create_model_card: what lies in the directory, and what it computes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction

from hf_qat.errors import ConfigError, ExportError, StageError
from hf_qat.export import export_onnx
from hf_qat.model.state import state_of
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.trainer import publishing as publisher_module
from hf_qat.trainer.measuring import measure
from hf_qat.trainer.publishing import dataset_name
from hf_qat.trainer.trainer import QATTrainer
from tests.exported import Exported, accuracy, processor, publisher, run
from tests.models import hand_written, resnet
from tests.training import arguments, differing, images, recipe, values


def figures(directory: Path) -> dict[str, float]:
    """What the model index of a card says, by the names of its entries."""
    results = ModelCard.load(directory / "README.md").data.eval_results or []
    return {result.metric_name: result.metric_value for result in results}


class TestDirectory:
    def test_it_holds_model_processor_onnx_bundle_card_and_sums(self, exported: Exported):
        top = {path.name for path in exported.directory.iterdir()}
        assert top == {
            "README.md",
            "SHA256SUMS",
            "accuracy.png",
            "config.json",
            "model.safetensors",
            "onnx",
            "preprocessor_config.json",
            "tidl",
        }
        assert [path.name for path in (exported.directory / "onnx").iterdir()] == ["model.onnx"]
        bundle = exported.directory / "tidl" / "AM68A"
        assert {"model", "config.yaml", "compile.py", "calibration", "check.json"} <= {
            p.name for p in bundle.iterdir()
        }

    def test_the_sums_are_those_of_all_files(self, exported: Exported):
        lines = (exported.directory / "SHA256SUMS").read_text().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        files = [p for p in exported.directory.rglob("*") if p.is_file() and p.name != "SHA256SUMS"]
        assert sums == {
            p.relative_to(exported.directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        }

    def test_from_pretrained_gives_the_logits_of_the_converted_model_bit_for_bit(self, exported: Exported):
        loaded = AutoModelForImageClassification.from_pretrained(exported.directory)
        with torch.no_grad():
            assert torch.equal(loaded(exported.pixels).logits, exported.trainer.convert()(exported.pixels).logits)
        processor = AutoImageProcessor.from_pretrained(exported.directory)
        assert type(processor).__name__.removesuffix("Pil") == "ViTImageProcessor"  # with torchvision, that

    @pytest.mark.parametrize("batch", [1, 3])
    def test_the_onnx_file_takes_any_batch_and_sees_the_same_classes(self, exported: Exported, batch: int):
        pixels = exported.pixels[:batch]
        with torch.no_grad():
            expected = exported.trainer.convert()(pixels).logits.argmax(-1)
        assert run(exported.directory / "onnx" / "model.onnx", pixels.numpy()).argmax(-1).tolist() == expected.tolist()

    def test_the_model_of_the_trainer_can_train_on(self, exported: Exported):
        model = exported.trainer.model
        assert state_of(model).stage == "prepared"
        assert all(parameter.requires_grad for parameter in model.parameters())
        # Arguments that other tests have made since have reset the state that all accelerators share.
        exported.trainer.create_accelerator_and_postprocess()
        assert exported.trainer.evaluate()["eval_accuracy"] == exported.trained


class TestFigures:
    def test_those_in_torch_are_what_evaluate_gave(self, exported: Exported):
        card = figures(exported.directory)
        assert card["accuracy, float, before quantization"] == 0.875
        assert card["accuracy, quantized by calibration alone"] == exported.calibrated
        assert card["accuracy, quantized, after training (QAT)"] == exported.trained
        assert exported.calibrated != exported.trained  # else the two could be mixed up

    def test_that_of_onnx_runtime_is_what_the_file_gives(self, exported: Exported):
        logits = run(exported.directory / "onnx" / "model.onnx", exported.pixels.numpy())
        by_hand = float((logits.argmax(-1) == exported.labels).mean())
        assert figures(exported.directory)["accuracy, onnx/model.onnx on ONNX Runtime"] == pytest.approx(by_hand)

    def test_losses_and_times_are_no_figures_of_quality(self, exported: Exported):
        assert {name.partition(",")[0] for name in figures(exported.directory)} == {"accuracy"}

    def test_the_file_is_measured_and_not_the_model(self, tmp_path: Path):
        """A file whose classifier has one more bias than the model: it always says class 2."""
        trainer = publisher(tmp_path, "int8")
        trainer.calibrate()
        directory = trainer.export(tmp_path / "out")
        file = onnx.load(directory / "onnx" / "model.onnx")
        output = file.graph.output[0].name
        for node in file.graph.node:
            node.output[:] = ["before" if name == output else name for name in node.output]
        bias = onnx.numpy_helper.from_array(np.eye(5, dtype=np.float32)[2] * 1e6, "bias")
        file.graph.initializer.append(bias)
        file.graph.node.append(onnx.helper.make_node("Add", ["before", "bias"], [output]))
        onnx.save(file, tmp_path / "always_2.onnx")
        measured = measure(trainer, "calibrated", trainer.convert(), tmp_path / "always_2.onnx")
        labels = trainer.eval_dataset["labels"][:].numpy()
        assert measured["onnxruntime"] == {"accuracy": pytest.approx((labels == 2).mean())}
        assert measured["calibrated"] == {"accuracy": trainer.evaluate()["eval_accuracy"]}
        assert trainer.measured_as == "calibrated"
        assert "qat" not in measured and "float" not in measured

    def test_metrics_that_look_at_images_and_losses_get_those_of_the_file_too(self, tmp_path: Path):
        seen = []

        def bright(prediction: EvalPrediction) -> dict[str, float]:
            seen.append(prediction.inputs)
            chosen = prediction.predictions.argmax(-1) == prediction.label_ids
            return {"bright": float(chosen[prediction.inputs.mean((1, 2, 3)) > 0].mean()), "n": len(prediction.losses)}

        trainer = publisher(
            tmp_path, "int8", compute_metrics=bright, include_for_metrics=["inputs", "loss"], max_steps=1
        )
        trainer.train()
        trainer.export(tmp_path / "out")
        assert trainer.exported.accuracy["onnxruntime"]["n"] == 50
        assert all(np.array_equal(images, seen[0]) for images in seen) and len(seen) == 2

    def test_within_fake_quant_disabled_evaluate_measures_the_float_model(self, tmp_path: Path):
        trainer = publisher(tmp_path, "int8")
        with fake_quant_disabled(trainer.model):
            evaluated = trainer.evaluate()
        assert trainer.measured_as is None
        trainer.calibrate()
        assert trainer.measured_as == "calibrated"
        trainer.evaluate(images(5, seed=3))  # another data set is none of the card's business
        trainer.evaluate(metric_key_prefix="test")
        assert trainer._record.accuracy == {"float": {"accuracy": evaluated["eval_accuracy"]}}

    def test_a_model_that_was_trained_before_is_not_called_calibrated(self, exported: Exported, tmp_path: Path):
        trainer = publisher(tmp_path, "AM68A", model=exported.trainer.model)
        trainer.evaluate()
        assert trainer.measured_as == "quantized" and trainer._record.accuracy == {}

    def test_stages_that_cannot_be_given_are_refused_before_anything_is_done(self, exported: Exported, tmp_path: Path):
        for metrics, message in [
            ({"flaot": {"accuracy": 0.5}}, "Did you mean 'float'"),
            ({"onnxruntime": {"accuracy": 0.5}}, "no stage that can be given"),
            ({"float": {"eval_loss": 0.5}}, "holds no metric"),
            ({"float": 0.5}, "holds no metric"),
        ]:
            with pytest.raises(ConfigError, match=message):
                exported.trainer.export(tmp_path / "out", metrics=metrics)
        with pytest.raises(TypeError, match="'licence'"):
            exported.trainer.export(tmp_path / "out", licence="mit")
        assert list(tmp_path.iterdir()) == []


class TestFailures:
    def test_a_failure_leaves_the_earlier_export_and_nothing_else(
        self, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def fail(model: nn.Module, directory: Path, *rest: object) -> None:
            (directory / "half").write_text("")
            raise RuntimeError("no more disk")

        out = tmp_path / "out"
        out.mkdir()
        (out / "SHA256SUMS").write_text("")
        (out / "earlier").write_text("whole")
        monkeypatch.setattr(publisher_module, "write_contents", fail)
        with pytest.raises(RuntimeError, match="no more disk"):
            exported.trainer.export(out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert {path.name: path.read_text() for path in out.iterdir()} == {"SHA256SUMS": "", "earlier": "whole"}

    def test_what_is_no_export_is_not_replaced(self, exported: Exported, tmp_path: Path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ExportError, match="not empty"):
            exported.trainer.export(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_compiled_artifacts_are_not_replaced(self, exported: Exported, tmp_path: Path):
        (tmp_path / "SHA256SUMS").write_text("")
        (tmp_path / "tidl" / "AM68A" / "artifacts").mkdir(parents=True)
        with pytest.raises(ExportError, match="holds a compiled model"):
            exported.trainer.export(tmp_path)

    def test_a_model_without_ranges_is_refused(self, tmp_path: Path):
        with pytest.raises(StageError, match="no range yet"):
            publisher(tmp_path / "run", "int8").export(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_model_that_from_pretrained_cannot_load_is_refused(self, tmp_path: Path):
        rows = [{"x": image} for image in images(8)["pixel_values"][:]]
        trainer = QATTrainer(
            hand_written(), arguments(tmp_path), qat_config=recipe(), train_dataset=rows, compute_metrics=accuracy
        )
        trainer.calibrate()
        with pytest.raises(ExportError, match="HandWritten is no Hugging Face model"):
            trainer.export(tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestDatasetName:
    def made(self, **info: object) -> Dataset:
        dataset = Dataset.from_dict({"x": [1]})
        for name, value in info.items():
            setattr(dataset.info, name, value)
        return dataset

    def test_one_of_the_hub_is_called_by_its_id_there(self):
        files = {"hf://datasets/ylecun/mnist@77f3279/mnist/test.parquet": {"num_bytes": 1, "checksum": None}}
        assert dataset_name(self.made(builder_name="parquet", download_checksums=files)) == "ylecun/mnist"

    def test_one_of_a_script_has_its_own_name_and_a_kind_of_file_is_none(self):
        assert dataset_name(self.made(builder_name="beans")) == "beans"
        assert dataset_name(self.made(builder_name="imagefolder")) is None
        assert dataset_name([1, 2]) is None


class TestTidl:
    @pytest.mark.slow
    def test_a_target_that_tidl_does_not_run_on_has_no_word_of_it(self, tmp_path: Path):
        trainer = publisher(tmp_path, "int8", qat={"exclude": "classifier"}, compute_metrics=None)
        trainer.calibrate()
        card = ModelCard.load(trainer.export(tmp_path / "out") / "README.md")
        assert not (tmp_path / "out" / "tidl").exists()
        assert card.data.tags == ["hf_qat", "int8", "onnx"]  # not trained, so no "qat"
        assert "TIDL" not in card.text
        assert "Not measured" in card.text and card.data.eval_results is None
        assert "| Gemm | `classifier.1/Gemm` | excluded by the recipe |" in card.text

    def test_what_tidl_cannot_have_is_said_in_the_card(self, tmp_path: Path):
        trainer = publisher(tmp_path, "TDA4VM", processing_class=processor(size=48), compute_metrics=None)
        trainer.calibrate()
        card = ModelCard.load(trainer.export(tmp_path / "out") / "README.md")
        assert not (tmp_path / "out" / "tidl").exists() and "tidl" not in card.data.tags
        reason = "the processor makes images of 48x48, the calibration data has 32x32"
        assert f"There is no bundle for TIDL on TDA4VM: {reason}" in card.text


class TestSaving:
    def test_save_quantized_writes_what_from_pretrained_loads(self, exported: Exported, tmp_path: Path):
        exported.trainer.save_quantized(tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == (exported.directory / "model.safetensors").read_bytes()
        assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["target"] == "AM68A"
        assert (tmp_path / "preprocessor_config.json").exists()

    @pytest.mark.slow
    def test_its_card_says_what_was_measured_before_and_after_training(self, tmp_path: Path):
        trainer = publisher(tmp_path, "AM68A", eval_strategy="steps", eval_steps=2, max_steps=4)
        calibrated = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        trainer.create_model_card()
        assert figures(tmp_path) == {"accuracy, quantized by calibration alone": calibrated}
        trained = trainer.evaluate()["eval_accuracy"]
        trainer.create_model_card()
        expected = {"accuracy, quantized by calibration alone": calibrated}
        assert figures(tmp_path) == {**expected, "accuracy, quantized, after training (QAT)": trained}
        trainer.train()  # what was measured is not of this model any more
        trainer.create_model_card()
        assert figures(tmp_path) == expected

    def test_a_checkpoint_of_the_training_has_a_card_of_its_own(self, tmp_path: Path):
        trainer = publisher(tmp_path, "AM68A")
        before = values(trainer.model)
        trainer.create_model_card(license="mit", tags=["tests"], dataset="Squares", dataset_tags="somebody/squares")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.tags == ["hf_qat", "tests"] and card.data.license == "mit"
        assert card.data.datasets == ["somebody/squares"]
        assert "training checkpoint" in card.text and "onnx/model.onnx" not in card.text
        assert differing(before, values(trainer.model)) == []


@pytest.mark.slow
def test_a_model_that_was_trained_on_several_sizes_is_exported_for_the_first(tmp_path: Path, caplog):
    """It is verified on images of that size; a file for another size is one more call, and computes the same."""

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        size = 32 if int(batch[0]["labels"]) % 2 else 48
        pixels = torch.stack([row["pixel_values"] for row in batch])
        labels = torch.stack([row["labels"] for row in batch])
        return {"pixel_values": nn.functional.interpolate(pixels, size=(size, size)), "labels": labels}

    args = arguments(tmp_path / "run", max_steps=3, per_device_eval_batch_size=4)
    data = {"train_dataset": images(20), "eval_dataset": images(12), "compute_metrics": accuracy}
    trainer = QATTrainer(resnet(), args, data_collator=collate, qat_config=recipe(), **data)
    trainer.train()
    with caplog.at_level("WARNING"):
        trainer.export(tmp_path / "out")
    assert "The images have several sizes" in caplog.text and "The file is not evaluated" in caplog.text
    assert trainer.exported.contents.onnx.samples > 0 and trainer.exported.contents.real_inputs
    converted = trainer.convert()
    (first,) = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx").get_inputs()
    assert sorted({32, 48} & set(first.shape)) == [first.shape[-1]]
    for size in (32, 48):
        x = torch.randn(1, 3, size, size)
        export_onnx(converted, tmp_path / f"{size}.onnx", {"pixel_values": x})
        (found,) = onnxruntime.InferenceSession(tmp_path / f"{size}.onnx").run(["logits"], {"pixel_values": x.numpy()})
        np.testing.assert_allclose(found, converted(x).logits, atol=0.05)
