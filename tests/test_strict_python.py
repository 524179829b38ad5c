"""The way from import to export where every warning is an error, and where Python drops every `assert`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


#: Warnings of libraries about themselves, as in pyproject.toml; `-W` takes how they begin.
OF_LIBRARIES = (
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
    "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning",
)

SCRIPT = """
import sys
from pathlib import Path

import torch

import hf_qat
from transformers import AutoModelForImageClassification
from tests.models import resnet
from tests.training import arguments, images, recipe

place = Path(sys.argv[1])
if __debug__ is (sys.argv[2] == "optimized"):
    sys.exit("assert does not do what this test is about")
args = arguments(place / "run", max_steps=2, save_strategy="steps", save_steps=1)
trainer = hf_qat.QATTrainer(resnet(), args, qat_config=recipe(), train_dataset=images(8), eval_dataset=images(4))
trainer.train()
trainer.evaluate()
trainer.save_quantized(place / "int8")
pixels = images(4)[:]["pixel_values"]
loaded = AutoModelForImageClassification.from_pretrained(place / "int8")
if not torch.equal(loaded(pixels).logits, trainer.convert()(pixels).logits):
    sys.exit("what was loaded is not what was saved")
report = hf_qat.export_onnx(loaded, place / "model.onnx", {"pixel_values": pixels})
if not report.max_abs_diff < 0.5:
    sys.exit("ONNX Runtime computes something else: " + str(report.max_abs_diff))
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["strict", "optimized"])
def test_train_save_load_and_export(mode: str, tmp_path: Path):
    if mode == "strict":
        flags = [word for entry in ("error", *OF_LIBRARIES) for word in ("-W", entry)]
    else:
        flags = ["-O"]
    command = [sys.executable, *flags, "-c", SCRIPT, str(tmp_path), mode]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("done\n")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-W", "error"], ["-O"], ["-OO"]], ids=" ".join)
def test_every_public_name_is_imported(flags: list[str]):
    """Without a warning; and without docstrings, which `-OO` drops."""
    if "-OO" in flags and find_spec("peft") is not None:
        pytest.skip("transformers imports peft where it is installed, and with it models that need their docstrings")
    code = "import hf_qat; [getattr(hf_qat, name) for name in hf_qat.__all__]; print('done')"
    result = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "done\n"
