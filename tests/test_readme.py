"""The README's Python, run from top to bottom in a new process, as a user does who copies it; docstrings' examples."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import yaml
from safetensors.torch import load_file

from tests.hub.server import HubServer
from tests.structure import ROOT


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHOWN = re.search(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

#: Of all blocks together.
SECONDS = 280


def run(blocks: list[str], directory: Path, environment: dict[str, str]) -> str:
    """What the blocks print, as one program in `directory`."""
    program = directory / "readme.py"
    program.write_text("\n\n".join(blocks), encoding="utf-8")
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        env={**os.environ, **environment, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def without_figures(text: str) -> list[str]:
    return [re.sub(r"[\d.]+", "#", line) for line in text.splitlines()]


@pytest.mark.slow
def test_every_python_block_runs_in_the_order_of_the_page(tmp_path: Path):
    assert SHOWN is not None and len(BLOCKS) == README.count("```python") >= 5
    with HubServer() as hub:
        printed = run(BLOCKS, tmp_path, hub.environment(tmp_path / "home"))
        (repository,) = hub.repositories.values()
    # The figures are those of the machine that the page was written on.
    lines, shown = without_figures(printed), without_figures(SHOWN[1])
    start = lines.index(shown[0])
    assert lines[start : start + len(shown)] == shown
    accuracies = [float(figure) for figure in re.findall(r"^float ([\d.]+)%, int8 ([\d.]+)%$", printed, re.M)[0]]
    assert min(accuracies) > 80
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 17
    assert (tmp_path / "bundle" / "compile.py").is_file()
    assert any(key.endswith("log2_scale") for key in load_file(tmp_path / "qat" / "model.safetensors"))
    files = repository.files()
    assert {"README.md", "model.safetensors", "onnx/model.onnx"} <= files.keys()
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["library_name"] == "transformers"


def test_the_first_block_needs_nothing_that_has_to_be_downloaded():
    assert "from_pretrained" not in BLOCKS[0] and "load_dataset" not in BLOCKS[0]


def test_paths_that_the_page_and_that_of_the_measurements_name_are_there():
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", README)
    measurements = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    files = re.findall(r"`(tests/[\w/.]+|hf_qat/[\w/.]+)`", README + measurements)
    assert links and files
    assert [path for path in (*links, *files) if not (ROOT / path).exists()] == []


WITH_EXAMPLES = [file for file in sorted((ROOT / "hf_qat").rglob("*.py")) if ">>>" in file.read_text("utf-8")]


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=lambda file: str(file.relative_to(ROOT)))
def test_examples_of_docstrings_are_right(file: Path):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    tried = doctest.testmod(importlib.import_module(name))
    assert tried.attempted and not tried.failed
