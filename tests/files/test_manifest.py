"""The manifest, read by the program that it is written for."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hf_qat.files.atomic import MANIFEST
from hf_qat.files.manifest import digest, write_manifest


def test_sha256sum_checks_every_file_at_any_depth_and_finds_the_one_that_was_changed(tmp_path: Path):
    for name in ("README.md", "model/model.onnx", "model/deep er/codes.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    write_manifest(tmp_path)  # it does not list itself

    def check() -> subprocess.CompletedProcess[str]:
        command = ["sha256sum", "--check", MANIFEST]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert check().returncode == 0
    assert sorted(check().stdout.splitlines()) == [
        "README.md: OK",
        "model/deep er/codes.bin: OK",
        "model/model.onnx: OK",
    ]
    (tmp_path / "model/model.onnx").write_text("changed")
    assert "model/model.onnx: FAILED" in check().stdout


def test_the_digest_is_that_of_the_standard(tmp_path: Path):
    # FIPS 180-2, appendix B.1: SHA-256 of "abc".
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
