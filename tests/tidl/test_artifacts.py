"""`hf-qat push --artifacts`: what TI's compiler made goes to the Hub in the bundle that it was made from."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from hf_qat.cli import main as cli
from tests.hub.faults import ALWAYS
from tests.hub.fixtures import snapshot


pytestmark = pytest.mark.usefixtures("waits")


@pytest.fixture
def exported(directory: Path) -> Path:
    """A directory with a bundle for each of two devices, and a manifest of all files."""
    shutil.rmtree(directory / "tidl")
    for device in ("AM62A", "TDA4VM"):
        bundle = directory / "tidl" / device
        (bundle / "model").mkdir(parents=True)
        (bundle / "model" / "net.onnx").write_bytes(f"a model for {device}".encode())
        (bundle / "runtime_options.json").write_text(json.dumps({"model": "model/net.onnx", "target": device}))
        (bundle / "config.yaml").write_text("session: {model_path: model/net.onnx}\n")
    (directory / "SHA256SUMS").write_text("")
    return directory


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """What `compile.py` of the bundle for TDA4VM writes."""
    made = tmp_path / "artifacts"
    (made / "tempDir").mkdir(parents=True)
    parts = ["0_tidl_net.bin", "0_tidl_io_1.bin", "allowedNode.txt", "onnxrtMetaData.txt", "tempDir/graph.svg"]
    for part in parts:
        (made / part).write_bytes(part.encode())
    sha256 = hashlib.sha256(b"a model for TDA4VM").hexdigest()
    record = {"model": "model/net.onnx", "sha256": sha256, "target": "TDA4VM"}
    (made / "compiled_from.json").write_text(json.dumps(record))
    return made


def push(directory: Path, artifacts: Path) -> int:
    return cli.main(["push", str(directory), "user/model", "--artifacts", str(artifacts)])


def test_they_are_packed_into_the_bundle_for_their_device_and_pushed(hub, exported, artifacts):
    assert push(exported, artifacts) == 0
    files = hub.repository("user/model").files()
    packed = {path for path in files if "artifacts" in path}
    names = ("0_tidl_net.bin", "0_tidl_io_1.bin", "allowedNode.txt", "onnxrtMetaData.txt", "compiled_from.json")
    assert packed == {f"tidl/TDA4VM/artifacts/{name}" for name in names}
    param = yaml.safe_load(files["tidl/TDA4VM/param.yaml"])
    assert param["session"]["artifacts_folder"] == "artifacts" and "tidl/AM62A/param.yaml" not in files


def test_the_manifest_of_the_whole_has_them_too(hub, exported, artifacts):
    push(exported, artifacts)
    digest = hashlib.sha256(b"0_tidl_net.bin").hexdigest()
    assert f"{digest}  tidl/TDA4VM/artifacts/0_tidl_net.bin\n" in (exported / "SHA256SUMS").read_text()


def test_the_same_command_again_changes_nothing(hub, exported, artifacts):
    push(exported, artifacts)
    before, commits = snapshot(exported), hub.repository("user/model").commits()
    assert push(exported, artifacts) == 0
    assert snapshot(exported) == before and hub.repository("user/model").commits() == commits


def test_it_completes_a_push_that_failed(hub, exported, artifacts):
    hub.plant("commit", status=500, times=ALWAYS)
    assert push(exported, artifacts) == 2
    hub.faults.clear()
    assert push(exported, artifacts) == 0
    assert "tidl/TDA4VM/artifacts/0_tidl_net.bin" in hub.repository("user/model").files()


def test_artifacts_in_the_bundle_itself_are_completed_and_pushed(hub, exported, artifacts):
    inside = exported / "tidl" / "TDA4VM" / "artifacts"
    shutil.copytree(artifacts, inside)
    assert push(exported, inside) == 0
    files = hub.repository("user/model").files()
    assert "tidl/TDA4VM/param.yaml" in files and "tidl/TDA4VM/artifacts/tempDir/graph.svg" not in files


def test_a_bundle_can_be_the_directory_that_is_pushed(hub, exported, artifacts):
    assert push(exported / "tidl" / "TDA4VM", artifacts) == 0
    assert "artifacts/0_tidl_net.bin" in hub.repository("user/model").files()


def _of_another_model(exported: Path, artifacts: Path) -> None:
    (exported / "tidl" / "TDA4VM" / "model" / "net.onnx").write_bytes(b"another")


def _without_a_part(exported: Path, artifacts: Path) -> None:
    (artifacts / "allowedNode.txt").unlink()


def _for_another_device(exported: Path, artifacts: Path) -> None:
    record = json.loads((artifacts / "compiled_from.json").read_text())
    (artifacts / "compiled_from.json").write_text(json.dumps({**record, "target": "AM69A"}))


def _without_bundles(exported: Path, artifacts: Path) -> None:
    shutil.rmtree(exported / "tidl")


def _packed_others(exported: Path, artifacts: Path) -> None:
    (exported / "tidl" / "TDA4VM" / "artifacts").mkdir()
    (exported / "tidl" / "TDA4VM" / "artifacts" / "0_tidl_net.bin").write_bytes(b"compiled earlier")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_of_another_model, "was compiled from another model"),
        (_without_a_part, "has no allowedNode.txt"),
        (_for_another_device, "was compiled for AM69A, and .* has bundles for AM62A, TDA4VM"),
        (_without_bundles, "has no TIDL bundle"),
        (_packed_others, "move it away first"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed_or_pushed(
    change, message, hub, exported, artifacts, capsys
):
    change(exported, artifacts)
    before = snapshot(exported)
    assert push(exported, artifacts) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-qat push: error: ") and re.search(message, error)
    assert snapshot(exported) == before and hub.requests == []
