import json
import re
from pathlib import Path

import onnx
import pytest
from huggingface_hub import ModelCard

from tests.notebook import NOTEBOOK, execute


def text_of(notebook: dict) -> str:
    """All that its cells printed."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def percentages(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(\S[^:\n]*?): +([\d.]+) %$", text, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_a_clean_kernel_and_its_model_is_on_the_hub(tmp_path: Path):
    notebook, hub = execute(tmp_path)
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


def test_the_notebook_is_committed_with_outputs_of_a_whole_run():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "bit-equal: True" in text_of(notebook)
