from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from hf_qat import QATConfig, calibrate, convert, prepare_qat
from hf_qat.errors import CaptureError, ConfigError
from hf_qat.model.saved_config import MAX_DIMENSIONS, describe_inputs, rebuild_inputs, rebuild_labelled_calls
from tests.models import resnet, vit


PIXELS = torch.zeros(2, 3, 32, 32)


def saved(model: nn.Module, directory: Path) -> dict:
    model.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def test_config_json_says_of_which_stage_class_and_versions_the_checkpoint_is(tmp_path):
    model = prepare_qat(resnet(), QATConfig("AM68A"), {"pixel_values": PIXELS})
    before = saved(model, tmp_path / "prepared")
    after = saved(convert(calibrate(model, [torch.randn(2, 3, 32, 32)])), tmp_path / "converted")
    for config, stage in ((before, "prepared"), (after, "converted")):
        checkpoint = config["checkpoint"]
        assert (config["quant_method"], config["target"], checkpoint["stage"]) == ("hf_qat", "AM68A", stage)
        assert checkpoint["model_class"] == "ResNetForImageClassification" and checkpoint["num_labels"] == 5
        assert checkpoint["transformers_version"] == transformers.__version__
        assert checkpoint["torch_version"] == torch.__version__
        assert list(checkpoint["operations"]) == ["classifier", "resnet"]


def test_other_models_of_the_same_config_object_are_not_quantized():
    config = resnet().config
    one, other = (transformers.ResNetForImageClassification(config) for _ in range(2))
    prepare_qat(one, QATConfig(), {"pixel_values": PIXELS})
    assert hasattr(one.config, "quantization_config") and one.resnet.config is one.config
    assert not hasattr(other.config, "quantization_config")


def test_the_file_has_the_names_that_the_model_has(tmp_path):
    model = prepare_qat(vit(1), QATConfig(), {"pixel_values": PIXELS})
    saved(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


class Twice(transformers.PreTrainedModel):
    """One convolution under two names, which its class does not declare."""

    config_class = transformers.ResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: transformers.ResNetConfig) -> None:
        super().__init__(config)
        self.first = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.second = nn.Sequential(self.first[0])
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(pixel_values))


def test_what_quantization_adds_to_a_module_with_two_names_is_written_under_both(tmp_path):
    model = prepare_qat(Twice(transformers.ResNetConfig()), QATConfig(), {"pixel_values": PIXELS})
    state = model.state_dict()
    scales = [key for key in state if key.endswith("0.weight_quantizer.log2_scale")]
    assert scales == ["first.0.weight_quantizer.log2_scale", "second.0.weight_quantizer.log2_scale"]
    assert torch.equal(*(state[key] for key in scales))
    assert state[scales[0]].data_ptr() != state[scales[1]].data_ptr()


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j], ids=["set", "object", "complex"])
def test_inputs_that_json_cannot_hold_are_refused_with_their_type(value):
    with pytest.raises(CaptureError, match=f"example_inputs hold a {type(value).__name__}, which config.json cannot"):
        describe_inputs({"pixel_values": PIXELS, "extra": value})


def test_inputs_are_described_at_a_batch_of_two():
    tensor = {"tensor": [2, 3, 4], "dtype": "float16"}
    described = describe_inputs({"x": torch.zeros(7, 3, 4, dtype=torch.float16), "flags": [True, None, 0.5, "a"]})
    assert described == [[], {"dict": {"x": tensor, "flags": [True, None, 0.5, "a"]}}]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ([[]], r"must be \[args, kwargs\]"),
        ([[], {"dict": {}}], "must hold either args or kwargs"),
        ([[{"tensor": [2, -1], "dtype": "float32"}], {"dict": {}}], "is no shape"),
        ([[{"tensor": [2] * (MAX_DIMENSIONS + 1), "dtype": "float32"}], {"dict": {}}], "is no shape"),
        ([[{"tensor": [2**20, 2**20], "dtype": "float32"}], {"dict": {}}], "is no shape"),
        ([[{"tensor": [2], "dtype": "nn"}], {"dict": {}}], "describes no tensor"),
        ([[{"tensor": [2]}], {"dict": {}}], "describes no tensor"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(description, message):
    with pytest.raises(ConfigError, match=message):
        rebuild_inputs(description)


def test_rebuilt_inputs_take_no_memory():
    (x,) = rebuild_inputs([[{"tensor": [2, 3], "dtype": "int64"}], {"dict": {}}])
    assert (x.device.type, x.dtype, tuple(x.shape)) == ("meta", torch.int64, (2, 3))


def test_inputs_come_back_from_json_with_shapes_dtypes_and_constants() -> None:
    inputs = {"pixel_values": torch.zeros(5, 3, 8, 8), "mask": [torch.ones(1, 4, dtype=torch.bool), None], "k": 3}
    back = rebuild_inputs(json.loads(json.dumps(describe_inputs(inputs))))
    assert isinstance(back, dict) and back["k"] == 3 and back["mask"][1] is None
    assert (back["pixel_values"].shape, back["pixel_values"].dtype) == ((2, 3, 8, 8), torch.float32)
    assert (back["mask"][0].shape, back["mask"][0].dtype) == ((2, 4), torch.bool)
    positional = rebuild_inputs(describe_inputs((torch.zeros(1, 7),)))
    assert isinstance(positional, tuple) and positional[0].shape == (2, 7)


def test_calls_that_labels_make_come_back_with_their_sizes_and_structure():
    call = [[{"tensor": [2, 7, 4], "dtype": "float32"}], {"dict": {"mask": {"tensor": [7, 7], "dtype": "bool"}}}]
    (training, calls), *others = rebuild_labelled_calls({"decoder": [[True, [call, call]]]})["decoder"]
    (args, kwargs), again = calls
    assert training and not others and len(again) == 2
    assert (args[0].shape, args[0].device.type) == ((2, 7, 4), "meta")
    assert (kwargs["mask"].shape, kwargs["mask"].dtype) == ((7, 7), torch.bool)


@pytest.mark.parametrize("rows", [3, [3], [[True, [[[], {}, 1]]]], [[True, [[{"dict": {}}, []]]]]])
def test_what_describes_no_calls_is_refused(rows):
    with pytest.raises(ConfigError, match="checkpoint\\['labelled_calls'\\]\\['decoder'\\]"):
        rebuild_labelled_calls({"decoder": rows})


@pytest.mark.parametrize("name", ['a"+b', "x y", "a\nimport os", "0", "", "a.b"])
def test_what_is_no_name_of_an_argument_is_refused_because_quantizers_are_named_after_arguments(name):
    tensor = {"tensor": [2, 3], "dtype": "float32"}
    with pytest.raises(ConfigError, match=r"checkpoint\['inputs'\].*no name of an argument"):
        rebuild_inputs([[], {"dict": {name: tensor}}])
    call = [[], {"dict": {name: tensor}}]
    with pytest.raises(ConfigError, match=r"checkpoint\['labelled_calls'\].*no name of an argument"):
        rebuild_labelled_calls({"decoder": [[True, [call, call]]]})
