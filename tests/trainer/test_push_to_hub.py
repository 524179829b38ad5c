"""From QATTrainer.push_to_hub, over HTTP, to a process that only knows the name of the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_qat.errors import ConfigError, PublishError
from hf_qat.trainer.trainer import QATTrainer
from tests.exported import Exported
from tests.hub.server import HubServer


#: What a user of the repository runs; prints JSON.
SCRIPT = """
import json, sys
import hf_qat
import numpy as np, onnxruntime, torch
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from transformers import AutoImageProcessor, AutoModelForImageClassification

pixels = np.load(sys.argv[1])
model = AutoModelForImageClassification.from_pretrained("user/tiny")
processor = AutoImageProcessor.from_pretrained("user/tiny")
with torch.no_grad():
    logits = model(torch.from_numpy(pixels)).logits
session = onnxruntime.InferenceSession(hf_hub_download("user/tiny", "onnx/model.onnx"))
card = ModelCard.load("user/tiny")
print(json.dumps({
    "directory": snapshot_download("user/tiny"),
    "logits": logits.tolist(),
    "classes": session.run(None, {"pixel_values": pixels})[0].argmax(-1).tolist(),
    "processor": type(processor).__name__,
    "figures": {result.metric_name: result.metric_value for result in card.data.eval_results},
    "usage": "user/tiny" in card.text,
}))
"""


@pytest.fixture
def trainer(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QATTrainer:
    """That of `exported`, which is to go to user/tiny."""
    trainer = exported.trainer
    for name, value in {"output_dir": str(tmp_path / "run"), "hub_model_id": "user/tiny"}.items():
        monkeypatch.setattr(trainer.args, name, value)
    monkeypatch.setattr(trainer, "hub_model_id", None)
    return trainer


@pytest.mark.slow
def test_what_was_pushed_works_in_a_new_process(
    trainer: QATTrainer, exported: Exported, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer.args, "hub_private_repo", True)
    commit = trainer.push_to_hub(commit_message="Digits", metrics={"float": {"accuracy": 0.875}})
    repository = hub.repository("user/tiny")
    assert repository.private and str(commit).startswith(hub.url)
    assert [entry.title for entry in repository.commits()][0] == "Digits"
    here = tmp_path / "run" / "export"
    files = {path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    on_the_hub = {name: content for name, content in repository.files().items() if name != ".gitattributes"}
    assert on_the_hub == files

    pixels = tmp_path / "pixels.npy"
    np.save(pixels, exported.pixels[:4].numpy())
    said = in_a_new_process(hub, tmp_path, pixels)
    downloaded = Path(said["directory"])
    assert {name: (downloaded / name).read_bytes() for name in files} == files
    expected = exported.trainer.convert()(exported.pixels[:4]).logits
    assert said["logits"] == expected.tolist()
    assert said["classes"] == expected.argmax(-1).tolist()
    assert said["processor"].removesuffix("Pil") == "ViTImageProcessor" and said["usage"]
    assert said["figures"]["accuracy, quantized, after training (QAT)"] == exported.trained


def in_a_new_process(hub: HubServer, directory: Path, pixels: Path) -> dict:
    """What SCRIPT says, with a cache of its own."""
    environment = {**os.environ, **hub.environment(directory / "other_home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SCRIPT, str(pixels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_refused_push_leaves_the_export_and_says_how_to_go_on(
    trainer: QATTrainer, exported: Exported, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The export itself is that of the other tests, so that this one is fast."""
    monkeypatch.setattr(trainer, "export", lambda directory, **card: exported.directory)
    with pytest.raises(PublishError, match="hf-qat push .*tiny user/tiny"):
        trainer.push_to_hub(token="hf_wrong")
    assert "user/tiny" not in hub.repositories and (exported.directory / "README.md").exists()
    commit = trainer.push_to_hub(revision="int8")
    assert commit.oid == hub.repository("user/tiny").commits("int8")[0].oid


def test_without_a_name_the_repository_is_called_after_the_directory(
    trainer: QATTrainer, exported: Exported, hub: HubServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer.args, "hub_model_id", None)
    monkeypatch.setattr(trainer, "export", lambda directory, **card: exported.directory)
    trainer.push_to_hub()
    assert list(hub.repositories) == ["user/run"]


def test_a_push_that_could_fail_unseen_is_refused(trainer: QATTrainer):
    with pytest.raises(ConfigError, match="could fail unseen"):
        trainer.push_to_hub(blocking=False)
