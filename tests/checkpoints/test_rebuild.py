"""How codes lie in a file, and what is refused: damaged and hostile checkpoints, each with file and key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

from hf_qat.checkpoints.stored_format import quantized_layers, stored_shape, stored_state
from hf_qat.checkpoints.validation import check_tensors, open_tensors
from hf_qat.config.checkpoint_info import CheckpointInfo
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError, HfQatError, WeightsError
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert, swap_to_integer_modules
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.saved_config import describe_inputs, rebuild_inputs
from tests.models import HUGGING_FACE


RESNET = HUGGING_FACE["resnet"]
STEM = "resnet.embedder.embedder.convolution"
OUT = f"{STEM}.activation_quantizer"

Tensors = dict[str, np.ndarray]


def quantized(config: QATConfig | None = None) -> nn.Module:
    model = prepare_qat(RESNET.make().eval(), config, {"pixel_values": RESNET.pixels(2)})
    return convert(calibrate(model, [RESNET.pixels(4, 1)]))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An affine model as a training and as a quantized checkpoint."""
    model = prepare_qat(RESNET.make().eval(), None, {"pixel_values": RESNET.pixels(2)})
    calibrate(model, [RESNET.pixels(4, 1)])
    paths = {stage: tmp_path_factory.mktemp(stage) for stage in ("prepared", "converted")}
    model.save_pretrained(paths["prepared"])
    convert(model).save_pretrained(paths["converted"])
    return paths


@pytest.fixture(scope="module")
def skeletons(directories: dict[str, Path]) -> dict[str, nn.Module]:
    """Both models on the meta device, as `from_pretrained` holds them against the file."""
    content = json.loads((directories["converted"] / "config.json").read_text())
    del content["quantization_config"]
    models = {}
    for stage in directories:
        with torch.device("meta"):
            model = transformers.ResNetForImageClassification(transformers.ResNetConfig.from_dict(content))
        models[stage] = prepare_qat(model, None, {"pixel_values": torch.empty(2, 3, 32, 32, device="meta")})
    swap_to_integer_modules(models["converted"])
    return models


def check(file: Path, skeleton: nn.Module) -> None:
    """What `from_pretrained` does before it reads weights, without capturing anew."""
    shapes = {f"{path}.weight": stored_shape(layer) for path, layer in quantized_layers(skeleton).items()}
    with open_tensors([str(file)], str(file.parent)) as stored:
        check_tensors(skeleton, stored, shapes, False)


def copied(directory: Path, target: Path) -> Path:
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def load(directory: Path) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_pretrained(directory)


# How codes are stored


def test_codes_are_stored_flat_under_the_name_of_the_weight(directories: dict[str, Path]) -> None:
    stored = load_file(directories["converted"] / "model.safetensors")
    layers = quantized_layers(load(directories["converted"]))
    assert layers
    for path, layer in layers.items():
        flat = stored[f"{path}.weight"]
        assert (flat.dtype, flat.shape) == (np.int8, (1, layer.codes.numel()))
        np.testing.assert_array_equal(flat[0], layer.codes.numpy().flatten())


@pytest.mark.parametrize(("bits", "inputs", "outputs"), [(8, 6, 1), (8, 1, 1), (4, 6, 1), (4, 1, 1), (8, 1, 6)])
def test_no_weight_has_the_shape_under_which_its_codes_are_stored(bits: int, inputs: int, outputs: int) -> None:
    model = prepare_qat(nn.Linear(inputs, outputs), QATConfig(weights={"bits": bits}), torch.randn(2, inputs))
    layer = convert(calibrate(model, [torch.randn(4, inputs)]))
    assert stored_shape(layer) != (outputs, inputs)
    assert stored_state(model)["weight"].shape == stored_shape(layer)


def test_codes_of_four_bits_lie_two_in_a_byte_and_come_back(tmp_path: Path) -> None:
    model = quantized(QATConfig("w4a8"))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    narrow = {path: layer for path, layer in quantized_layers(model).items() if layer.weight_spec.bits == 4}
    assert narrow
    back = quantized_layers(load(tmp_path))
    for path, layer in narrow.items():
        packed = stored[f"{path}.weight"][0]
        codes = np.stack([packed & 15, packed >> 4], 1).flatten()[: layer.codes.numel()].astype(np.int8)
        np.testing.assert_array_equal(np.where(codes > 7, codes - 16, codes), layer.codes.numpy().flatten())
        assert torch.equal(back[path].codes, layer.codes)


# What is refused: the tensors

REPLACED: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray], str]] = {
    "NaN scale": ("converted", f"{OUT}.scale", lambda x: x * np.nan, "scale of nan"),
    "negative scale": ("converted", f"{OUT}.scale", lambda x: -x, "scale of -"),
    "zero scale": ("converted", f"{OUT}.scale", lambda x: x * 0, "scale of 0.0"),
    "denormal scale": ("converted", f"{OUT}.scale", lambda x: x * 0 + np.float32(1e-40), "denormal"),
    "infinite scale": ("converted", f"{STEM}.weight_scale", lambda x: x + np.inf, "scale of inf"),
    "negative bias scale": ("converted", f"{STEM}.bias_scale", lambda x: -x, "scale of -"),
    "zero point of a symmetric tensor": ("converted", f"{OUT}.zero_point", lambda x: x * 0 + 3, r"3, outside of \[0"),
    "code -128": ("converted", f"{STEM}.weight", lambda x: np.full_like(x, -128), r"codes from -128"),
    "float codes": ("converted", f"{STEM}.weight", lambda x: x.astype(np.float32), "F32 instead of I8"),
    "codes in their true shape": ("converted", f"{STEM}.weight", lambda x: x.reshape(8, 3, 7, 7), r"shape \[8, 3, 7"),
    "codes of another layer": ("converted", f"{STEM}.weight", lambda x: x[:, :-1], r"instead of \[1, 1176\]"),
    "int16 bias": ("converted", f"{STEM}.bias", lambda x: x.astype(np.int16), "I16 instead of I32"),
    "float64 scale": ("converted", f"{OUT}.scale", lambda x: x.astype(np.float64), "F64 instead of F32"),
    "two scales": ("converted", f"{OUT}.scale", lambda x: np.stack([x, x]), r"shape \[2\] instead of \[\]"),
    "NaN learned scale": ("prepared", f"{OUT}.log2_scale", lambda x: x * np.nan, "scale of nan"),
    "vanishing learned scale": ("prepared", f"{OUT}.log2_scale", lambda x: x * 0 - 200, "scale of 0.0"),
    "overflowing learned scale": ("prepared", f"{OUT}.log2_scale", lambda x: x * 0 + 200, "scale of inf"),
    "denormal learned scale": ("prepared", f"{STEM}.weight_quantizer.log2_scale", lambda x: x * 0 - 130, "denormal"),
    "NaN offset": ("prepared", "resnet.pixel_values_quantizer.offset", lambda x: x * np.nan, "NaN or infinity"),
    "negative count": ("prepared", f"{OUT}.observed", lambda x: x - 5, "counts batches"),
    "another shape": ("prepared", f"{STEM}.weight", lambda x: x[:4], r"shape \[4, 3, 7, 7\]"),
    "integer weight": ("prepared", f"{STEM}.weight", lambda x: x.astype(np.int32), "I32 instead of F32"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_tensor_that_makes_no_sense_is_refused_with_file_and_key(
    name: str, directories: dict[str, Path], skeletons: dict[str, nn.Module], tmp_path: Path
) -> None:
    stage, key, change, words = REPLACED[name]
    file = tmp_path / "model.safetensors"
    tensors = load_file(directories[stage] / file.name)
    tensors[key] = np.array(change(tensors[key]), order="C")
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=words) as error:
        check(file, skeletons[stage])
    assert str(file) in str(error.value) and repr(key) in str(error.value)


def test_a_zero_point_beyond_the_codes_is_refused(tmp_path: Path) -> None:
    quantized(QATConfig(activations={"bits": 4})).save_pretrained(tmp_path)
    file, key = tmp_path / "model.safetensors", "resnet.pixel_values_quantizer.zero_point"
    tensors = load_file(file)
    tensors[key] = np.array(16, tensors[key].dtype)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=rf"{re.escape(key)}.* is the zero point 16, outside of \[0, 15\]"):
        load(tmp_path)


def dropped(tensors: Tensors) -> None:
    del tensors[f"{OUT}.scale"]


def added(tensors: Tensors) -> None:
    tensors["resnet.extra"] = np.zeros(1, np.float32)


def added_path(tensors: Tensors) -> None:
    tensors["../../etc/passwd"] = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("change", "key"), [(dropped, f"{OUT}.scale"), (added, "resnet.extra"), (added_path, "../../etc/passwd")]
)
def test_missing_and_extra_tensors_are_refused_with_file_and_key(
    change: Callable[[Tensors], None],
    key: str,
    directories: dict[str, Path],
    skeletons: dict[str, nn.Module],
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.safetensors"
    tensors = load_file(directories["converted"] / file.name)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(WeightsError) as error:
        check(file, skeletons["converted"])
    assert str(file) in str(error.value) and repr(key) in str(error.value)


# What is refused: the file


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by its specification: u64 length, JSON, data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.99])
def test_a_file_that_was_cut_short_is_refused(share: float, directories: dict[str, Path], tmp_path: Path) -> None:
    file = copied(directories["converted"], tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(WeightsError, match="cut short") as error:
        load(tmp_path)
    assert str(file) in str(error.value)


def test_a_tensor_of_a_trillion_elements_is_refused_before_it_is_made(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    file = copied(directories["converted"], tmp_path) / "model.safetensors"
    header, data = header_of(file)
    header[f"{STEM}.weight"]["shape"] = [1, 10**12]
    write(file, header, data)
    with pytest.raises(WeightsError) as error:
        load(tmp_path)
    assert str(file) in str(error.value)


def test_a_model_of_a_trillion_weights_is_refused_before_it_is_made(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    config = copied(directories["prepared"], tmp_path) / "config.json"
    content = json.loads(config.read_text())
    content["hidden_sizes"] = [10**6, 10**6]
    config.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="another graph"):
        load(tmp_path)


def test_an_index_that_leads_out_of_the_directory_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    copied(directories["converted"], inside)
    (inside / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = header_of(tmp_path / "elsewhere.safetensors")[0]
    for outside in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        index = {"metadata": {}, "weight_map": {name: outside for name in names if name != "__metadata__"}}
        (inside / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(WeightsError, match="outside"):
            load(inside)


def test_a_pickle_is_not_read(directories: dict[str, Path], tmp_path: Path) -> None:
    copied(directories["converted"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickle"):
        load(tmp_path)


# What is refused: the config

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


# Example inputs as JSON


def test_inputs_come_back_from_json_with_shapes_dtypes_and_constants() -> None:
    inputs = {"pixel_values": torch.zeros(5, 3, 8, 8), "mask": [torch.ones(1, 4, dtype=torch.bool), None], "k": 3}
    back = rebuild_inputs(json.loads(json.dumps(describe_inputs(inputs))))
    assert isinstance(back, dict) and back["k"] == 3 and back["mask"][1] is None
    assert (back["pixel_values"].shape, back["pixel_values"].dtype) == ((2, 3, 8, 8), torch.float32)
    assert (back["mask"][0].shape, back["mask"][0].dtype) == ((2, 4), torch.bool)
    positional = rebuild_inputs(describe_inputs((torch.zeros(1, 7),)))
    assert isinstance(positional, tuple) and positional[0].shape == (2, 7)


# Fuzzing


def is_sound(file: Path, original: dict[str, Any]) -> bool:
    """By numpy: header as it was, and every scale positive, finite and normal."""
    header, data = header_of(file)
    if {k: v for k, v in header.items() if k != "__metadata__"} != original:
        return False
    for key, entry in original.items():
        if key.endswith("scale"):
            values = np.frombuffer(data[slice(*entry["data_offsets"])], np.float32)
            if not (np.isfinite(values).all() and (values >= np.finfo(np.float32).tiny).all()):
                return False
    return True


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_sound(
    data: st.DataObject,
    directories: dict[str, Path],
    skeletons: dict[str, nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = directories["converted"] / "model.safetensors"
    original = {k: v for k, v in header_of(source)[0].items() if k != "__metadata__"}
    content = bytearray(source.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    kind = data.draw(st.sampled_from(["cut", "header", "scales", "anywhere"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "header":
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    elif kind == "scales":
        key = data.draw(st.sampled_from([key for key in original if key.endswith("scale")]))
        start = header_end + original[key]["data_offsets"][0]
        value = data.draw(st.floats(width=32))
        content[start : start + 4] = np.float32(value).tobytes()
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(bytes(content))
    try:
        check(file, skeletons["converted"])
    except WeightsError as error:
        assert str(file) in str(error)  # noqa: PT017
    else:
        assert is_sound(file, original)


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
