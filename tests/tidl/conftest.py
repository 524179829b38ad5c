"""Bundles of tiny Hugging Face models, each exported once, and the stand-in for TI's onnxruntime."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import nn
from transformers import ViTImageProcessorPil

from hf_qat import export_onnx
from hf_qat.tidl import bundle, export_tidl
from tests.tidl.cases import FRAMES, MODELS, SCHEMES, scenes, trained
from tests.tidl.stand_in import StandIn


@pytest.fixture(scope="session")
def converted() -> Callable[[str, str], nn.Module]:
    """`converted(name, device)`: a trained model in the device's scheme; made once, not to be changed."""
    make = cache(trained)
    return lambda name, device: make(name, SCHEMES[device])


@pytest.fixture(scope="session")
def exported_once() -> object:
    """Let `export_tidl` export each model once in a session: of the same model it always is the same file."""
    files: dict[int, bytes] = {}

    def export(model: nn.Module, path: Path, *arguments: object, **options: object) -> None:
        if id(model) not in files:
            export_onnx(model, path, *arguments, **options)
            files[id(model)] = path.read_bytes()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(files[id(model)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "export_onnx", export)
        yield files


@pytest.fixture(scope="session")
def bundled(
    converted: Callable[[str, str], nn.Module], exported_once: object, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`bundled(name, device, ranges)`: a bundle with a processor; made once, not to be changed."""

    @cache
    def make(name: str, device: str, ranges: str = "qdq") -> Path:
        size = MODELS[name].size
        processor = ViTImageProcessorPil(size={"height": size, "width": size})
        directory = tmp_path_factory.mktemp(f"{name}-{device}") / "bundle"
        batches = [{"pixel_values": scenes(name, FRAMES + 3, seed=1)[0]}]
        return export_tidl(
            converted(name, device), directory, device, batches, processor, frames=FRAMES, ranges=ranges
        )

    return make


@pytest.fixture
def copied(bundled: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`copied(…)`: a copy of that bundle, to be changed."""

    def make(*arguments: str) -> Path:
        return Path(shutil.copytree(bundled(*arguments), tmp_path / "copy"))

    return make


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in, and a machine on which TI's tools are set up."""
    monkeypatch.setenv("TIDL_TOOLS_PATH", "/opt/tidl_tools")
    return StandIn()
