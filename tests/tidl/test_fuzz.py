"""Damaged and made-up ONNX files: `check_tidl` reports on each, or refuses it with an `ExportError`.

All of them: `python -m pytest tests/tidl/test_fuzz.py`; without those that take long, a sample.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_qat import check_tidl
from hf_qat.errors import ExportError
from tests.onnx_mutations import mutated_onnx


slow = pytest.mark.slow


@pytest.mark.parametrize(("seed", "tries"), [(0, 30), *(pytest.param(seed, 1000, marks=slow) for seed in range(1, 3))])
@pytest.mark.parametrize("name", ["resnet", pytest.param("segformer", marks=slow)])
def test_a_damaged_file_is_reported_on_or_refused(
    name: str, seed: int, tries: int, bundled: Callable[..., Path], tmp_path: Path
) -> None:
    draw, file = random.Random(seed), tmp_path / "model.onnx"
    (source,) = (bundled(name, "AM68A") / "model").glob("*.onnx")
    content, refused = source.read_bytes(), 0
    for _ in range(tries):
        file.write_bytes(mutated_onnx(content, draw))
        try:
            report = check_tidl(file, "AM68A")
        except ExportError as error:
            assert str(error)
            refused += 1
        else:
            assert str(report).isprintable() or "\n" in str(report)
            assert "\x1b" not in str(report)
            json.dumps(report.to_dict())
    assert 0 < refused < tries
