"""What is refused of the files of a checkpoint: damaged and hostile ones, each with file and key."""

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

from hf_qat.checkpoints.stored_format import quantized_layers, stored_shape
from hf_qat.checkpoints.validation import check_tensors, open_tensors
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import WeightsError
from hf_qat.model.conversion import swap_to_integer_modules
from hf_qat.model.prepare import prepare_qat
from tests.checkpoints.damaged import OUT, STEM, Tensors, copied, header_of, load, quantized, write


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


# The tensors

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


# The file


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
