"""The README of a bundle: what it is, how TI's tools compile and run it, what to know."""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

from onnx import ModelProto

from hf_qat.export.onnx_graph import opset_of
from hf_qat.tidl.adapt import attention_like
from hf_qat.tidl.config_yaml import Task
from hf_qat.tidl.devices import Device
from hf_qat.tidl.report import TidlReport
from hf_qat.tidl.runtime_options import Ranges
from hf_qat.version import __version__


RANGES_TEXT = {
    "qdq": "Its quantizers are in the file (Q/DQ), and TIDL calibrates nothing.",
    "clip": "Its ranges are in the file as Clip nodes, the older form for this device.",
}

#: Where edgeai-benchmark looks: `interfaces/get_configs_from_file.py` joins `models_path` and a plain `configs_path`;
#: `sessions/basert_session.py` takes the path of the model from where it is started.
BENCHMARK = """\
With edgeai-benchmark instead: start it from inside this directory (the model's path is relative to it), with these
settings:

```
target_device: $target
models_path: .
configs_path: config.yaml
```

Its data are its own: in `config.yaml`, `calibration_dataset` and `input_dataset` are null. Put the name of one of its
data sets there (`imagenet`, `ade20k`, `coco`, `nyudepthv2`, …), or a dictionary with `type`, the name of one of its
data set classes, and the arguments of that class."""

#: `core/onnxrt_runtime.py` assigns the option to ONNX Runtime's SessionOptions, which take their own enum only.
OPTIMIZATIONS = """

This model is to be compiled with ONNX Runtime's optimizations off. `compile.py` does so; YAML cannot say it to
edgeai-benchmark, so set it in Python:

```
settings.runtime_options["onnxruntime:graph_optimization_level"] = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
```"""

#: `preprocess/transforms.py`, ImageRead, and `postprocess/transforms.py`, DetectionResizePad.
OPENCV = """

For detection it reads and resizes images with OpenCV, whose bilinear filter does not average where it shrinks, as the
model's image processor does: its inputs differ a little from those that the model was trained on."""

NO_BENCHMARK = "With edgeai-benchmark this bundle does not run, since it has no `config.yaml`: see above."


@dataclass(frozen=True)
class Readme:
    """What the README tells.

    Attributes:
        name: of the model; its file is `model/<name>.onnx`.
        device: what it was trained for.
        ranges: how the model carries its ranges.
        task: of the model, if edgeai-benchmark knows it.
        file: the model itself.
        check: what `check_tidl` said of the file.
        frames: how many calibration frames there are.
        why_no_config: why there is no `config.yaml`; `None` if there is one.
    """

    name: str
    device: Device
    ranges: Ranges
    task: Task | None
    file: ModelProto
    check: TidlReport
    frames: int
    why_no_config: str | None


def readme(facts: Readme, template: str) -> str:
    """The text of `README.md`.

    Args:
        facts: what it tells.
        template: with `$` for each of them.
    """
    path = f"model/{facts.name}.onnx"
    return Template(template).substitute(
        name=facts.name,
        target=facts.device.name,
        soc=facts.device.soc,
        tools_soc=facts.device.tools.value,
        version=__version__,
        ranges=RANGES_TEXT[facts.ranges],
        check=str(facts.check).replace(f"{facts.check.path} on", f"{path} on"),
        model=path,
        opset=opset_of(facts.file),
        frames=facts.frames,
        config=facts.why_no_config or "how images are prepared, what the outputs mean",
        benchmark=_benchmark(facts),
        photo=" photo.jpg" if facts.why_no_config is None else "",
        notes="\n".join(f"- {note}" for note in facts.check.notes),
    )


def _benchmark(facts: Readme) -> str:
    """How edgeai-benchmark runs the bundle."""
    if facts.why_no_config is not None:
        return NO_BENCHMARK
    text = BENCHMARK
    if attention_like(facts.file):
        text += OPTIMIZATIONS
    if facts.task is not None and facts.task.backend == "cv2":
        text += OPENCV
    return Template(text).substitute(target=facts.device.name)
