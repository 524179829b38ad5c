"""Broken sources of weights: real files of each kind, cut at many places; whatever is wrong is one kind of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_qat import load_weights
from hf_qat.checkpoints.sources import read_weights
from hf_qat.errors import WeightsError
from tests.models import hand_written


def state() -> dict[str, Tensor]:
    return {"conv.weight": torch.randn(20, 30), "steps": torch.arange(5)}


def write_zip(path: Path) -> None:
    torch.save(state(), path)


def write_legacy(path: Path) -> None:
    """The format of PyTorch before 1.6: several pickles, one after the other, and then the numbers."""
    torch.save(state(), path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path) -> None:
    save_file(state(), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "model.pt": write_zip,
    "pytorch_model.bin": write_legacy,
    "model.safetensors": write_safetensors,
}

#: What lies under the name of a file of weights when a download or a script went wrong.
NO_WEIGHTS = {
    "text": b"hello world\n" * 20,
    "empty": b"",
    "page of a proxy": b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>",
    "pointer of git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214\nsize 12345\n",
    "JSON": b'{"epoch": 3}',
    "zip of something else": b"PK\x03\x04\x14\x00\x00\x00",
    "end of a pickle": b".",
    "header of a huge safetensors": b"\xff" * 8 + b"{}",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_cut_anywhere_is_refused_by_name_and_a_whole_one_is_read(name: str, tmp_path: Path):
    file = tmp_path / name
    WRITERS[name](file)
    content = file.read_bytes()
    assert torch.equal(read_weights(file)["steps"], torch.arange(5))
    for length in {*range(0, 600, 11), *range(600, len(content), len(content) // 50), len(content) - 1}:
        file.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=f"{name} cannot be read as weights"):
            read_weights(file)


@pytest.mark.parametrize("name", [*WRITERS, "weights"])
@pytest.mark.parametrize("content", NO_WEIGHTS)
def test_a_file_of_another_kind_is_refused_and_nothing_is_loaded(content: str, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(NO_WEIGHTS[content])
    model = hand_written()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=name):
        load_weights(model, tmp_path / name)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", [*NO_WEIGHTS, "deeply nested"])
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path):
    nested = b'{"weight_map":' + b"[" * 200_000
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(NO_WEIGHTS.get(content, nested))
    with pytest.raises(WeightsError, match="is no index of weights"):
        read_weights(index)


def test_an_index_that_lists_a_directory_or_a_broken_shard_is_refused(tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv.weight": "model-00001-of-00001.safetensors"}}))
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.mkdir()
    with pytest.raises(WeightsError, match=f"lists {shard.name}, which is not there"):
        read_weights(tmp_path)
    shard.rmdir()
    shard.write_bytes(b"\0" * 7)
    with pytest.raises(WeightsError, match=f"{shard.name} cannot be read as weights"):
        read_weights(tmp_path)


def test_a_directory_under_the_name_of_a_file_is_looked_into(tmp_path: Path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match="in this directory"):
        read_weights(tmp_path / "model.safetensors")
