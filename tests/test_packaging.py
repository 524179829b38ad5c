"""Wheel and sdist hold the package, install, and import; the API reference has every public name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import hf_qat
from tests.structure import ROOT


#: Prints the name of what it builds.
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist of a copy of what git has."""
    folder = tmp_path_factory.mktemp("packaging")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith("hf_qat/") or "/" not in name:
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    found = []
    for step in ("build_wheel", "build_sdist"):
        command = [sys.executable, "-W", "ignore", "-c", BUILD, step, str(folder / "dist")]
        done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=True)
        found.append(folder / "dist" / done.stdout.splitlines()[-1])
    wheel, sdist = found
    return wheel, sdist


def files_of_the_package() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_qat").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_of_the_package(built):
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if name.startswith("hf_qat/")}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    assert in_wheel == files_of_the_package()
    assert files_of_the_package() | {"pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.mark.slow
def test_an_installed_wheel_imports_and_has_its_command(built, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(built[0])], check=True, capture_output=True)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import hf_qat; "
        "print(hf_qat.__file__, hf_qat.__version__, hf_qat.QATConfig('J721S2').target)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "hf_qat" / "__init__.py"), hf_qat.__version__, "AM68A"]
    script = (tmp_path / "bin" / "hf-qat").read_text()
    assert "from hf_qat.cli.main import main" in script


def test_every_extra_that_a_message_or_the_readme_names_is_there():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    sources = [ROOT / "README.md", *(ROOT / "hf_qat").rglob("*.py")]
    named = {
        extra
        for path in sources
        for group in re.findall(r"hf_qat\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert {"export", "report", "demo"} <= named <= extras
    assert {"export", "report", "timm", "cli"} <= extras


@pytest.mark.slow
def test_the_reference_has_every_public_name_and_its_docstring(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.reference", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    page = (tmp_path / "hf_qat.html").read_text(encoding="utf-8")
    assert done.stdout.split()[-1] == str(tmp_path / "hf_qat.html")
    for name in hf_qat.__all__:
        if name != "__version__":
            assert f'id="{name}"' in page
    assert "Make <code>model</code> compute as the target will" in page
