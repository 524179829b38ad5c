"""The manifest of a directory: one line a file, as `sha256sum` writes and checks it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hf_qat.files.atomic import MANIFEST, whole_file


def digest(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_manifest(directory: Path) -> None:
    """Write `SHA256SUMS` of all files below a directory; one that is there stays until the new one is complete."""
    files = sorted(Path(root) / name for root, _, names in os.walk(directory) for name in names if name != MANIFEST)
    lines = [f"{digest(file)}  {file.relative_to(directory).as_posix()}\n" for file in files]
    with whole_file(directory / MANIFEST) as file:
        file.write_text("".join(lines), encoding="utf-8")
