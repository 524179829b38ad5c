"""Damaged and made-up ONNX files: `verify_onnx` compares each, or refuses it with an `ExportError`.

All of them: `python -m pytest tests/export/test_fuzz.py`; without those that take long, a sample.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hf_qat import export_onnx, verify_onnx
from hf_qat.errors import ExportError
from tests.checkpoints.damaged import RESNET, quantized
from tests.onnx_mutations import mutated_onnx


@pytest.mark.parametrize(("seed", "tries"), [(0, 20), pytest.param(1, 1000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_compared_or_refused(seed: int, tries: int, tmp_path: Path) -> None:
    model, batch = quantized(), {"pixel_values": RESNET.pixels(1)}
    export_onnx(model, tmp_path / "whole.onnx", batch, verify=False)
    content = (tmp_path / "whole.onnx").read_bytes()
    draw, file, refused = random.Random(seed), tmp_path / "model.onnx", 0
    for _ in range(tries):
        file.write_bytes(mutated_onnx(content, draw))
        try:
            report = verify_onnx(model, file, [batch])
        except ExportError as error:
            assert str(file) in str(error)
            refused += 1
        else:
            assert report.samples == 1 and report.plain is not None
    assert 0 < refused < tries
