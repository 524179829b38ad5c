from __future__ import annotations

from pathlib import Path

import pytest

from hf_qat.errors import PublishError
from hf_qat.publish.files import published_files


#: What others need, anywhere in a directory.
WANTED = [
    "README.md",
    "model.safetensors",
    "onnx/model.onnx",
    "sub/_private.txt",
    "tidl/AM68A/artifacts/net.bin",
    ".gitattributes",
]

#: What they do not, and what must not be seen.
UNWANTED = [
    "training_args.bin",
    "sub/training_args.bin",
    "_incomplete/model.safetensors",
    "checkpoint-10/model.safetensors",
    "model.safetensors.tmp",
    "sub/.cache/x",
    ".env",
    "sub/__pycache__/a.pyc",
    "tidl/AM68A/artifacts/tempDir/graph.bin",
    "notes.md~",
]


def test_the_files_that_others_need_are_found_sorted_at_any_depth(tmp_path: Path):
    for name in (*WANTED, *UNWANTED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = published_files(tmp_path)
    assert list(found) == sorted(WANTED)
    assert found["onnx/model.onnx"] == tmp_path / "onnx" / "model.onnx"


def test_names_of_the_top_directory_can_be_left_out_and_those_below_stay(tmp_path: Path):
    for name in ("export/a", "sub/export/a", "b.log", "c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(published_files(tmp_path, ("export", "*.log"))) == ["c", "sub/export/a"]


def test_nothing_to_publish_is_refused(tmp_path: Path):
    (tmp_path / "_push").mkdir()
    with pytest.raises(PublishError, match="nothing to publish"):
        published_files(tmp_path)
    with pytest.raises(PublishError, match="is no directory"):
        published_files(tmp_path / "absent")
