"""The notebooks: run from a clean kernel, committed with real outputs, and what they say tried."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

import hf_qat
from hf_qat.quantization.converted import QuantizedLayer
from tests.notebook import NOTEBOOKS, execute
from tests.structure import ROOT


def text_of(notebook: dict) -> str:
    """All that its cells printed."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def percentages(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(\S[^:\n]*?): +([\d.]+) %$", text, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_a_clean_kernel_and_its_model_is_on_the_hub(tmp_path: Path):
    notebook, hub = execute("qat_digits_to_hub", tmp_path)
    text = text_of(notebook)
    found = percentages(text)
    assert found["float"] > 95
    assert min(found["calibrated"], found["trained"]) > found["float"] - 3
    assert found["ONNX Runtime, from the Hub"] == found["trained"]
    assert "bit-equal: True" in text

    (name,) = hub.repositories
    files = hub.repository(name).files()
    assert {"model.safetensors", "config.json", "onnx/model.onnx", "tidl/TDA4VM/compile.py"} <= files.keys()
    onnx.checker.check_model(onnx.load_from_string(files["onnx/model.onnx"]))
    results = ModelCard(files["README.md"].decode()).data.eval_results
    assert [round(100 * result.metric_value, 2) for result in results] == [
        found["float"],
        found["calibrated"],
        found["trained"],
        found["ONNX Runtime, from the Hub"],
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_four_lines_make_an_integer_model_of_an_image_folder(tmp_path: Path):
    text = text_of(execute("qat_in_four_lines", tmp_path)[0])
    found = percentages(text)
    assert found["float"] > 90 and found["trained"] > found["float"] - 3
    assert found["ONNX Runtime"] == found["trained"]
    before, after = re.findall(r"outputs: ([\d.]+) dB; with 8 bits at these layers: ([\d.]+) dB", text)[0]
    assert float(after) > float(before)
    assert (tmp_path / "digits-w4a4" / "onnx" / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loop_of_ti_gives_a_file_for_tidl(tmp_path: Path):
    text = text_of(execute("coming_from_ti", tmp_path)[0])
    found = percentages(text)
    assert found["float"] > 85 and found["trained"] > found["float"] - 3
    assert found["calibrated, 8 bits"] > found["float"] - 3
    assert "top-1 agreement 100.00%" in text and "TIDL takes it" in text
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 17


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_detector_finds_shapes_in_float_in_int8_and_on_onnx_runtime(tmp_path: Path):
    text = text_of(execute("detection_to_int8", tmp_path)[0])
    found = {name: float(value) for name, value in re.findall(r"^(\w+): ([\d.]+) mAP", text, re.MULTILINE)}
    assert found["float"] > 60
    assert min(found["calibrated"], found["trained"]) > found["float"] - 3
    assert f"{found['trained']}" in re.findall(r"^map, .*ONNX Runtime +([\d.]+)$", text, re.MULTILINE)
    (session,) = tmp_path.glob("shapes-int8/onnx/model.onnx")
    assert {value.name for value in onnx.load(session).graph.output} >= {"logits", "pred_boxes"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_is_committed_with_outputs_of_a_whole_run(name):
    notebook = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert name != "qat_digits_to_hub" or "bit-equal: True" in text_of(notebook)


def rows_of_tables() -> list[tuple[str, str]]:
    """What TI calls it, and the call here, of every row of the tables in the notebook that has one."""
    cells = json.loads(NOTEBOOKS["coming_from_ti"].read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.findall(r"^\| (`.+?) \| `(.+?)` \| .*\|$", text, re.MULTILINE)


class Small(nn.Module):
    """A convolution with batch norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) → (N, 4)."""
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A float model, images, and a wrapper that has seen them in training."""
    torch.manual_seed(0)
    model, images = Small().eval(), torch.randn(8, 3, 8, 8)
    wrapper = hf_qat.QATFxModule(copy.deepcopy(model), 2, hf_qat.QATConfig("AM68A"), images[:2])
    wrapper.train()
    wrapper(images)
    return {"model": model, "images": images, "wrapper": wrapper}


@pytest.fixture
def surroundings(trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the calls of the tables use; each call may change what it gets."""
    monkeypatch.chdir(tmp_path)
    own = copy.deepcopy(trained)
    more = {"torch": torch, "batches": list(own["images"].split(2)), "float_state": own["model"].state_dict()}
    return {**{name: getattr(hf_qat, name) for name in hf_qat.__all__}, **own, **more}


@pytest.mark.parametrize(("theirs", "ours"), rows_of_tables(), ids=lambda text: text.strip("`")[:40])
def test_every_call_that_takes_the_place_of_one_of_tis_can_be_made(theirs, ours, surroundings):
    if "export_onnx" in ours or "export_tidl" in ours:
        surroundings["wrapper"].convert()
    exec(ours, surroundings)  # noqa: S102


class TestPresets:
    """What TI's presets say in so many letters: bits, per channel or tensor, symmetric, powers of two."""

    def config(self, preset: str) -> hf_qat.QATConfig:
        (call,) = [ours for theirs, ours in rows_of_tables() if f"`{preset}`" in theirs]
        return eval(call, {"QATConfig": hf_qat.QATConfig})

    @pytest.mark.parametrize(
        ("preset", "weights", "activations"),
        [
            ("WC8_AT8", (8, True, False), (8, False, False)),
            ("MSA_WC8_AT8", (8, True, False), (8, False, False)),
            ("DEFAULT", (8, True, False), (8, False, False)),
            ("WT8SYMP2_AT8SYMP2", (8, False, True), (8, True, True)),
            ("WC8SYMP2_AT8SYMP2", (8, True, True), (8, True, True)),
            ("WC8SYMP2_AT8SYMP2R4", (8, True, True), (8, True, True)),
            ("WC8P2_AT8P2", (8, True, True), (8, False, True)),
            ("MSA_WC8P2_AT8P2", (8, True, True), (8, False, True)),
            ("WC4_AT8", (4, True, False), (8, False, False)),
            ("WC4M4_AT8", (4, True, False), (8, False, False)),
        ],
    )
    def test_a_preset_has_the_scheme_of_its_name(self, preset, weights, activations):
        """Weights: bits, per channel, power of two; activations: bits, symmetric, power of two."""
        config = self.config(preset)
        found = config.weight_scheme
        assert (found.bits, found.per_channel, found.power_of_two) == weights
        found = config.activation_scheme
        assert (found.bits, found.symmetric, found.power_of_two) == activations


def test_every_argument_of_tis_wrapper_has_its_row():
    """Those of the constructor of `QATFxModule`, edgeai-modeloptimization v2."""
    arguments = (
        "model qconfig_type example_inputs example_kwargs is_qat backend total_epochs num_batch_norm_update_epochs "
        "num_observer_update_epochs qconfig_mode add_methods dynamo_export bias_calibration_factor "
        "transformation_dict copy_attrs"
    )
    cells = json.loads(NOTEBOOKS["coming_from_ti"].read_text(encoding="utf-8"))["cells"]
    (table,) = ["".join(cell["source"]) for cell in cells if "## Arguments of" in "".join(cell["source"])]
    named = re.findall(r"`(\w+)[=`]", " ".join(row.split(" | ")[0] for row in table.splitlines()[4:]))
    assert set(arguments.split()) == set(named) - {"PTCFxModule"}


def test_a_converted_wrapper_of_the_tables_holds_integers(surroundings):
    exec("wrapper = wrapper.convert()", surroundings)  # noqa: S102
    assert isinstance(surroundings["wrapper"].module.conv, QuantizedLayer)


def test_notebooks_that_others_name_are_there():
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"notebooks/(\w+)\.ipynb", text))
    assert named == NOTEBOOKS.keys()
