"""What is refused of the config of a checkpoint, which says how to build the graph again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_qat import calibrate, convert, export_onnx, prepare_qat, verify_onnx
from hf_qat.config.checkpoint_info import CheckpointInfo
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError, HfQatError, WeightsError
from hf_qat.model.saved_config import rebuild_inputs
from tests.checkpoints.damaged import copied, load
from tests.coverage.dense import DENSE
from tests.coverage.detection import DETECTION
from tests.graph.capture.test_ways import MoreQueries, boxes
from tests.models import resnet


Change = Callable[[dict[str, Any]], None]


def nested(*path: str, value: object) -> Change:
    def change(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


CONFIGS: dict[str, tuple[Change, str]] = {
    "unknown field": (nested("wieghts", value={}), "unknown key 'wieghts'"),
    "newer version": (nested("hf_qat_version", value="99.0"), "written by hf_qat 99.0"),
    "no checkpoint": (lambda content: content.pop("checkpoint"), "no entry 'checkpoint'"),
    "checkpoint of another kind": (nested("checkpoint", value=7), "must be an object, not 7"),
    "unknown field of the checkpoint": (nested("checkpoint", "stages", value=1), "unknown key 'stages'"),
    "unknown stage": (nested("checkpoint", "stage", value="half"), "must be one of prepared, converted, not 'half'"),
    "operations of another kind": (nested("checkpoint", "operations", value={"resnet": [1]}), "list of strings"),
    "no inputs": (nested("checkpoint", "inputs", value=[]), "must be [args, kwargs]"),
    "endless input": (
        nested("checkpoint", "inputs", value=[[{"tensor": [2, 3, 10**6, 10**6], "dtype": "float32"}], {"dict": {}}]),
        "no shape of an example input",
    ),
    "input of no dtype": (
        nested("checkpoint", "inputs", value=[[{"tensor": [2, 3, 32, 32], "dtype": "load"}], {"dict": {}}]),
        "describes no tensor",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_makes_no_sense_is_refused(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    change, words = CONFIGS[name]
    config = copied(directories["converted"], tmp_path) / "config.json"
    content = json.loads(config.read_text())
    change(content["quantization_config"])
    config.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=re.escape(words)):
        load(tmp_path)


def test_another_graph_is_refused_with_both_versions_and_the_first_difference(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    config = copied(directories["converted"], tmp_path) / "config.json"
    content = json.loads(config.read_text())
    checkpoint = content["quantization_config"]["checkpoint"]
    checkpoint["transformers_version"] = "5.99.0"
    checkpoint["operations"]["resnet"][1] = "embedder.embedder.activation: gelu"
    config.write_text(json.dumps(content))
    with pytest.raises(WeightsError) as error:
        load(tmp_path)
    for words in ("5.99.0", transformers.__version__, "'embedder.embedder.activation: gelu'", "entry 1", "'resnet'"):
        assert words in str(error.value)


def test_a_model_of_a_trillion_weights_is_refused_before_it_is_made(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    config = copied(directories["prepared"], tmp_path) / "config.json"
    content = json.loads(config.read_text())
    content["hidden_sizes"] = [10**6, 10**6]
    config.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="another graph"):
        load(tmp_path)


# Fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(data=st.data())
def test_a_mutated_config_is_refused_or_means_what_it_says(data: st.DataObject, directories: dict[str, Path]) -> None:
    content = json.loads((directories["converted"] / "config.json").read_text())["quantization_config"]
    place = data.draw(st.sampled_from([content, content["checkpoint"]]))
    key = data.draw(st.sampled_from(sorted(place)) | st.text(min_size=1, max_size=8))
    place[key] = data.draw(JSON)
    try:
        config = QATConfig.from_dict(content)
        rebuild_inputs(CheckpointInfo.from_dict(config.checkpoint).inputs)
    except HfQatError:
        return
    written = config.to_dict()
    for name in content:
        if name not in ("freeze_bn_at", "checkpoint", "hf_qat_version", "exclude", "overrides", "target"):
            assert written[name] == content[name] or not content[name]


class Detector(transformers.PreTrainedModel):
    """Its decoder gets queries of the labels, and a mask, in training."""

    config_class = transformers.ResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: transformers.ResNetConfig) -> None:
        super().__init__(config)
        self.inner = MoreQueries()
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        return self.inner(pixel_values, labels)


def test_a_training_checkpoint_goes_on_training_with_labels(tmp_path):
    torch.manual_seed(0)
    model, x = Detector(transformers.ResNetConfig()), torch.randn(2, 6, 8)
    prepare_qat(model, QATConfig(), {"pixel_values": x, "labels": boxes(1, 2)})
    calibrate(model, [x])
    model.save_pretrained(tmp_path / "first")
    again = Detector.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    losses = []
    for candidate in (model, again, Detector.from_pretrained(tmp_path / "second")):
        torch.manual_seed(1)
        losses.append(candidate.train()(x, boxes(9, 4))["loss"].detach())
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.slow
def test_tied_weights_and_parameters_that_know_no_meta_device_come_back(tmp_path: Path):
    """Deformable DETR's heads are one in all layers, and its embedding of levels is made by `torch.Tensor(n, d)`."""
    case = next(case for case in DETECTION if case.cls == "DeformableDetrForObjectDetection")
    inputs = case.batch(2)
    model = prepare_qat(case.make(), QATConfig(), inputs)
    calibrate(model, [inputs])
    assert model.class_embed[0].weight is model.class_embed[1].weight
    model.eval().save_pretrained(tmp_path / "training")
    loaded = type(model).from_pretrained(tmp_path / "training").eval()
    assert loaded.class_embed[0].weight is loaded.class_embed[1].weight
    converted = convert(copy.deepcopy(model))
    converted.save_pretrained(tmp_path / "quantized")
    quantized = type(model).from_pretrained(tmp_path / "quantized")
    for ours, theirs in ((model, loaded), (converted, quantized)):
        expected, found = ours(**inputs), theirs(**inputs)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.pred_boxes, expected.pred_boxes)


@pytest.mark.slow
def test_tied_heads_for_other_labels_stay_tied_and_have_scales_of_their_weights(tmp_path: Path):
    case = next(case for case in DETECTION if case.cls == "DeformableDetrForObjectDetection")
    model = prepare_qat(case.make(), QATConfig(), case.batch(2))
    calibrate(model, [case.batch(2)])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    first, second = loaded.class_embed
    assert first.weight is second.weight and first.bias is second.bias and first.weight.shape[0] == 9
    largest = first.weight.abs().amax(1)
    for head in (first, second):
        scale = head.weight_quantizer.scale.flatten()
        assert ((largest / scale > 32) & (largest / scale < 256)).all()


@pytest.mark.slow
@pytest.mark.parametrize("cls", ["RTDetrV2ForObjectDetection", "DFineForObjectDetection", "Deimv2ForObjectDetection"])
def test_what_deformable_attention_checks_needs_no_values(cls: str, tmp_path: Path):
    case = next(case for case in DETECTION if case.cls == cls)
    inputs = case.batch(2)
    model = calibrate(prepare_qat(case.make(), QATConfig(), inputs), [inputs]).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    expected, found = model(**inputs), loaded(**inputs)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.pred_boxes, expected.pred_boxes)


@pytest.mark.parametrize("quantized", [False, True], ids=["training", "quantized"])
def test_a_model_for_images_of_several_sizes_takes_them_again(quantized: bool, tmp_path: Path):
    inputs, other = ({"pixel_values": torch.randn(2, 3, *size)} for size in ((32, 32), (48, 64)))
    model = prepare_qat(resnet(), QATConfig(), inputs, other_size=other)
    calibrate(model, [inputs])
    model = convert(model) if quantized else model.eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for size in ((32, 32), (64, 40), (96, 32)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.slow
@torch.no_grad()
def test_key_points_come_back_bit_for_bit_copied_and_on_onnx_runtime(tmp_path: Path):
    """SuperPoint: how many there are depends on the image, and a constant follows their device."""
    case = next(case for case in DENSE if case.cls == "SuperPointForKeypointDetection")
    model, images = prepare_qat(case.make(), QATConfig(), case.batch(2)), case.batch(3, seed=5)
    calibrate(model, [case.batch(2, seed=1)])
    for stage in ("prepared", "converted"):
        expected = model(**images)
        model.save_pretrained(tmp_path / stage)
        loaded = type(model).from_pretrained(tmp_path / stage)
        for other in (loaded, copy.deepcopy(loaded)):
            assert all(torch.equal(value, expected[name]) for name, value in other(**images).items())
        if stage == "prepared":
            convert(model)
    counts = expected["mask"].sum(1).tolist()
    assert len(set(counts)) > 1  # else nothing would be padded
    export_onnx(model, tmp_path / "model.onnx", case.batch(1), verify=False)
    assert verify_onnx(model, tmp_path / "model.onnx", [images]).plain.relative_error < 1e-3
