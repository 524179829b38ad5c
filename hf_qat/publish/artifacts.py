"""What TI's compiler made, into the bundle of a directory that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

from hf_qat.errors import PublishError
from hf_qat.tidl.artifacts import SETTINGS, pack_artifacts
from hf_qat.tidl.files import MANIFEST, write_manifest
from hf_qat.tidl.templates.compile import RECORD


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
