"""Install the wheel into empty environments, and use it there: the newest versions, and the oldest that we declare.

    python -m tests.benchmarks.installs --directory out

In each environment PyTorch goes first, then the wheel with its extra `export`, with which the whole way is gone
(train, export, verify, save, load); then all extras that a user can want, with which README's first block runs. The
oldest are the lower bounds of `pyproject.toml`; of PyTorch that of `constraints.txt` as long as `--oldest_torch` names
no other, as older ones come with all of CUDA. Needs a package index, and minutes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.structure import ROOT
from tests.test_readme import BLOCKS


#: What a user can want (other extras are for tests), and the extras that have libraries of their own in it.
EXPORT, ALL = "export", "cli,demo,timm"
PARTS = {EXPORT: ["export"], ALL: ["export", "report", "detection", "demo", "timm"]}

#: The whole way, without any extra but `export`.
SMOKE = """
import time
import torch, transformers
start = time.perf_counter()
import hf_qat
assert time.perf_counter() - start < 1, "importing hf_qat takes more than a second beyond transformers and torch"

torch.manual_seed(0)
sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}
model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
images = torch.randn(8, 3, 32, 32)
rows = [{"pixel_values": image, "labels": number % 4} for number, image in enumerate(images)]
args = transformers.TrainingArguments("run", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
trainer = hf_qat.QATTrainer(model, args, qat_config=hf_qat.QATConfig("AM68A"), train_dataset=rows, eval_dataset=rows)
trainer.train()
report = hf_qat.export_onnx(trainer.convert(), "model.onnx", images)
assert report.top1_agreement == 1, report
converted = trainer.convert()
converted.save_pretrained("int8")
loaded = type(converted).from_pretrained("int8")
assert torch.equal(loaded(images).logits, converted(images).logits)
hf_qat.export_tidl(converted, "bundle", "AM68A", calibration_data=[images])
assert hf_qat.check_tidl(next(__import__("pathlib").Path("bundle/model").glob("*.onnx")), "AM68A").ok
print("smoke: ok", torch.__version__, transformers.__version__)
"""


def lower_bounds(wheel: Path, extras: Sequence[str]) -> Iterator[str]:
    """`name==version` for each lower bound of a wheel, and of some of its extras, but PyTorch's."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    bounds = re.findall(r'^Requires-Dist: ([\w.-]+)>=([\w.]+)(?:; extra == "(\w+)")?$', text, re.MULTILINE)
    for name, version, extra in bounds:
        if name != "torch" and (not extra or extra in extras):
            yield f"{name}=={version}"


def run(*words: object, folder: Path) -> None:
    """A command; its words are printed."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], cwd=folder, check=True)


def try_install(folder: Path, wheel: Path, torch: str, oldest: bool) -> None:
    """In an environment of its own, in an empty folder."""
    folder.mkdir(parents=True)
    run(sys.executable, "-m", "venv", folder / "environment", folder=folder)
    python = folder / "environment" / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*install, torch, folder=folder)
    for extras, program in ((EXPORT, SMOKE), (ALL, BLOCKS[0])):
        pins = lower_bounds(wheel, PARTS[extras]) if oldest else ()
        run(*install, torch, f"{wheel}[{extras}]", *pins, folder=folder)
        (folder / "program.py").write_text(program, encoding="utf-8")
        run(python, "-W", "ignore", "program.py", folder=folder)
    run(folder / "environment" / "bin" / "hf-qat", "--version", folder=folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Both environments; raises where one fails."""
    pinned = re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("installs"), help="to write to; default: installs")
    parser.add_argument("--oldest_torch", default=pinned, help="default: %(default)s")
    options = parser.parse_args(argv)
    directory = options.directory.absolute()
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory / "wheel", ROOT)
    directory.mkdir(parents=True, exist_ok=True)
    run(*build, folder=directory)
    (wheel,) = (directory / "wheel").glob("*.whl")
    try_install(directory / "newest", wheel, pinned, oldest=False)
    try_install(directory / "oldest", wheel, options.oldest_torch, oldest=True)


if __name__ == "__main__":
    main()
