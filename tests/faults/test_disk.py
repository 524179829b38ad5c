"""Disks that are full, and places that nobody may write to: an error that says so, and nothing that was there goes.

Full in two ways: a limit on the size of a file, which needs no rights, and, where the tests may mount one, a small
file system that is full.
"""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_qat import export_onnx, export_tidl
from hf_qat.errors import HfQatError
from hf_qat.files.manifest import write_manifest
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from tests.models import HUGGING_FACE
from tests.training import recipe, trainer_of, vit


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and file systems are those of Linux")

RESNET = HUGGING_FACE["resnet"]
BATCH = {"pixel_values": RESNET.pixels(2)}


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    model = prepare_qat(RESNET.make(), recipe(target="AM68A"), BATCH)
    return convert(calibrate(model, [BATCH]))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, writing beyond `size` bytes fails, as on a full disk, but with `EFBIG`."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("not allowed to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def is_about_space(error: BaseException) -> bool:
    """Whether it, or what it came of, is the system's own word for no space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG):
            return True
        if any(word in str(error).lower() for word in ("no space left", "file too large")):
            return True
        error = error.__cause__ or error.__context__
    return False


Write = Callable[[nn.Module, Path], object]

WRITES: dict[str, Write] = {
    "export": lambda model, place: export_onnx(model, place / "model.onnx", BATCH, verify=False),
    "bundle": lambda model, place: export_tidl(model, place / "bundle", "AM68A", [BATCH], frames=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(0, marks=pytest.mark.slow), 20_000])
@pytest.mark.parametrize("name", ["export", pytest.param("bundle", marks=pytest.mark.slow)])
def test_what_was_exported_before_stays_where_the_new_one_does_not_fit(
    name: str, size: int, converted: nn.Module, tmp_path: Path
):
    WRITES[name](converted, tmp_path)
    before = contents(tmp_path)
    with pytest.raises((OSError, HfQatError)) as error, files_of_at_most(size):
        WRITES[name](converted, tmp_path)
    assert is_about_space(error.value)
    assert contents(tmp_path) == before
    WRITES[name](converted, tmp_path)  # the next one goes on


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_a_training_goes_on_from_it(tmp_path: Path):
    changes = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(vit(), tmp_path, max_steps=1, **changes).train()
    before = contents(tmp_path / "checkpoint-1")
    trainer = trainer_of(vit(), tmp_path, max_steps=2, **changes)
    with pytest.raises(Exception) as error, files_of_at_most(10_000):  # torch.save has errors of its own
        trainer.train(resume_from_checkpoint=True)
    assert is_about_space(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert contents(tmp_path / "checkpoint-1") == before
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_model_that_does_not_fit_leaves_the_one_before(tmp_path: Path):
    trainer = trainer_of(vit(), tmp_path)
    trainer.save_model()
    before = contents(tmp_path)
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    with pytest.raises(Exception) as error, files_of_at_most(10_000):
        trainer.save_model()
    assert is_about_space(error.value)
    assert contents(tmp_path) == before


def test_a_manifest_that_does_not_fit_leaves_the_one_before(tmp_path: Path):
    for name in ("model.onnx", "README.md"):
        (tmp_path / name).write_text(name)
        write_manifest(tmp_path)
    (tmp_path / "param.yaml").write_text("later")
    before = contents(tmp_path)
    with pytest.raises(OSError) as error, files_of_at_most(100):  # one line and a half
        write_manifest(tmp_path)
    assert is_about_space(error.value)
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_a_full_file_system_keeps_what_was_on_it(name: str, converted: nn.Module, small_disk: Path):
    WRITES["export"](converted, small_disk)
    before = contents(small_disk)
    (small_disk / "filler").write_bytes(bytes(100_000))
    place = small_disk if name == "bundle" else small_disk / "new"
    (small_disk / "more").write_bytes(bytes(45_000))
    with pytest.raises((OSError, HfQatError)) as error:
        for number in range(3):
            WRITES[name](converted, place / str(number))
    assert is_about_space(error.value)
    assert before.items() <= contents(small_disk).items()
    assert not list(small_disk.rglob(".*"))


@pytest.mark.parametrize("name", WRITES)
def test_a_place_that_nobody_may_write_to_is_named(name: str, converted: nn.Module):
    with pytest.raises((OSError, HfQatError), match="cannot write /proc/.*Choose a path that you may write to"):
        WRITES[name](converted, Path("/proc/hf_qat"))


def test_a_training_says_where_it_may_not_save():
    with pytest.raises(OSError, match="/proc/hf_qat"):
        trainer_of(vit(), Path("/proc/hf_qat"))
