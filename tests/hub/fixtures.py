"""A directory to push, and no waiting."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hf_qat.publish import retry


CARD = "---\nlibrary_name: transformers\ntags:\n- qat\n---\n# A model\n"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses that we and the client made, in seconds, instead of making them."""
    made: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": made.append})
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return made


@pytest.fixture
def contents() -> dict[str, bytes]:
    """What is to be on the Hub: small files and large ones, in directories too."""
    random = np.random.default_rng(0)
    return {
        "README.md": CARD.encode(),
        "config.json": b"{}\n",
        "model.safetensors": random.bytes(300_000),
        "onnx/model.onnx": random.bytes(200_000),
        "tidl/AM62A/config.yaml": b"task_type: classification\n",
    }


@pytest.fixture
def directory(tmp_path: Path, contents: dict[str, bytes]) -> Path:
    """The same, among files that are of no use to others."""
    made = tmp_path / "export"
    unwanted = {
        "training_args.bin": b"a pickle with hub_token",
        "checkpoint-3/model.safetensors": b"0",
        "_push/model.safetensors": b"0",
        "model.safetensors.tmp": b"half",
        ".model.json.swp": b"0",
        ".cache/huggingface/x": b"0",
        "tidl/AM62A/artifacts/tempDir/graph.bin": b"0",
        "tidl/AM62A/__pycache__/compile.pyc": b"0",
    }
    for path, content in {**contents, **unwanted}.items():
        file = made / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return made


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
