"""Compiled artifacts that a user brings back: are they whole, are they of this model, and `param.yaml` beside them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from hf_qat.errors import ExportError, PublishError
from hf_qat.files.atomic import MANIFEST, whole_directory, whole_file
from hf_qat.files.manifest import digest, write_manifest
from hf_qat.tidl.templates.compile import PARTS, RECORD


ARTIFACTS = "artifacts"

#: Says that a directory is a bundle of `export_tidl`, and for which device.
SETTINGS = "runtime_options.json"

#: Its existence tells TI's tools that a model is compiled (edgeai-benchmark, docs/usage.md); so it comes last.
PARAM = "param.yaml"

#: Not needed to run, and large: TI's own packages leave it out too (edgeai-benchmark, interfaces/run_package.py).
WORKING_FILES = "tempDir"


def pack_artifacts(bundle: str | os.PathLike[str], artifacts: str | os.PathLike[str] | None = None) -> Path:
    """Put what TI's compiler made into the bundle that it was made from, with `param.yaml` and a new manifest.

    Nothing is changed unless everything is in order. Packing the same artifacts again changes nothing.

    Args:
        bundle: a directory that `export_tidl` wrote.
        artifacts: the directory that `compile.py` wrote; the bundle's own `artifacts/` if left out.

    Returns:
        The bundle.

    Raises:
        ExportError: `bundle` is none; one of the four parts is missing or empty; they are of another model or device;
            the bundle holds other artifacts already.
    """
    bundle = Path(bundle)
    own = bundle / ARTIFACTS
    artifacts = own if artifacts is None else Path(artifacts)
    settings = bundle / SETTINGS
    if not settings.is_file():
        raise ExportError(f"{bundle} is no bundle of export_tidl: it has no {settings.name}.")
    check_artifacts(artifacts, bundle, json.loads(settings.read_text(encoding="utf-8")))
    if artifacts.resolve() != own.resolve():
        _copy(artifacts, own)
    if (bundle / "config.yaml").is_file():
        content = _param(_read(bundle / "config.yaml"), _read(bundle / "dataset.yaml"))
        with whole_file(bundle / PARAM) as file:
            file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    write_manifest(bundle)
    return bundle


def _copy(artifacts: Path, own: Path) -> None:
    """All of them or none, but for what is not needed to run."""
    if own.exists() and any(own.iterdir()):
        if _contents(own) != _contents(artifacts):
            raise ExportError(f"{own} holds other artifacts than {artifacts} already: move it away first.")
        return
    with whole_directory(own, RECORD) as made:
        shutil.copytree(artifacts, made, ignore=shutil.ignore_patterns(WORKING_FILES), dirs_exist_ok=True)


def _contents(directory: Path) -> dict[str, str]:
    """SHA-256 of each file by its path, but for what is not needed to run."""
    files = {file.relative_to(directory): file for file in directory.rglob("*") if file.is_file()}
    return {path.as_posix(): digest(file) for path, file in files.items() if WORKING_FILES not in path.parts}


def check_artifacts(artifacts: Path, bundle: Path, settings: dict[str, Any]) -> None:
    """Raise `ExportError` unless all parts are there, not empty, and of this model."""
    if not artifacts.is_dir():
        raise ExportError(f"{artifacts} is no directory: give the artifacts/ that compile.py writes.")
    for part in PARTS:
        found = list(artifacts.glob(part))
        if not found:
            raise ExportError(f"{artifacts} has no {part}: the compilation did not end well. Run compile.py again.")
        for empty in (file for file in found if not file.stat().st_size):
            raise ExportError(f"{empty} is empty: the compilation did not end well. Run compile.py again.")
    record = artifacts / RECORD
    if not record.is_file():
        raise ExportError(
            f"{artifacts} has no {record.name}, so it cannot be told which model was compiled: compile with this "
            "bundle's compile.py."
        )
    made = json.loads(record.read_text(encoding="utf-8"))
    if made.get("sha256") != digest(bundle / settings["model"]) or made.get("target") != settings["target"]:
        raise ExportError(
            f"{artifacts} was compiled from another model or for another device ({made.get('model')}, "
            f"{made.get('target')}, SHA-256 {str(made.get('sha256'))[:12]}…): run compile.py of {bundle}."
        )


def _read(file: Path) -> dict[str, Any]:
    """The content of a YAML file; nothing, where there is none."""
    return dict(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _param(config: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    """`config.yaml` with the folders and the data that TI's demos read.

    They look up class names in `dataset.yaml` only where the data have a name (edgeai-dl-inferer).
    """
    session = {**config["session"], "artifacts_folder": ARTIFACTS, "model_folder": "model"}
    data: dict[str, Any] = {"name": Path(session["model_path"]).stem}
    if dataset:
        classes = max(category["id"] for category in dataset["categories"]) + 1
        data |= {"num_classes": classes, "dataset_info": "dataset.yaml"}
    return {**config, "session": session, "calibration_dataset": dict(data), "input_dataset": data}


def add_artifacts(directory: Path, artifacts: Path) -> Path:
    """Check compiled artifacts and pack them into their bundle; nothing is done if they are there already.

    Args:
        directory: a bundle, or what has bundles as `tidl/<target>/`.
        artifacts: the directory that `compile.py` wrote.

    Returns:
        The bundle.

    Raises:
        PublishError: no bundle, or none for the device that they were compiled for.
        ExportError: a part is missing, or they are of another model.
    """
    bundle = _bundle_of(directory, artifacts)
    pack_artifacts(bundle, artifacts)
    if (directory / MANIFEST).is_file():
        write_manifest(directory)
    return bundle


def _bundle_of(directory: Path, artifacts: Path) -> Path:
    bundles = sorted(file.parent for pattern in (SETTINGS, f"tidl/*/{SETTINGS}") for file in directory.glob(pattern))
    if len(bundles) == 1:
        return bundles[0]
    devices = {_entry(bundle / SETTINGS, "target"): bundle for bundle in bundles}
    if not devices:
        raise PublishError(
            f"{directory} has no TIDL bundle to pack {artifacts} into: export with a TIDL target first."
        )
    device = _entry(artifacts / RECORD, "target")
    if device not in devices:
        raise PublishError(
            f"{artifacts} was compiled for {device or 'an unknown device'}, and {directory} has bundles for "
            f"{', '.join(devices)}: name the artifacts of one of them."
        )
    return devices[device]


def _entry(file: Path, name: str) -> str:
    return str(json.loads(file.read_text(encoding="utf-8")).get(name, "")) if file.is_file() else ""
