"""What killed processes leave beside an output goes with the next one; what living ones are writing stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_qat.files import aside
from hf_qat.files.atomic import MANIFEST, whole_directory, whole_file


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by a signal")

#: Writes half a file and half a bundle, says so, and goes on when its input is closed.
WRITER = """
import os, sys
from pathlib import Path
from hf_qat.files.atomic import whole_directory, whole_file

with whole_file(Path("model.onnx")) as file, whole_directory(Path("bundle"), "artifacts") as bundle:
    file.write_text("half")
    (bundle / "SHA256SUMS").write_text("half")
    print("half", flush=True)
    sys.stdin.read()
    file.write_text("the other process's")
    (bundle / "SHA256SUMS").write_text("the other process's")
"""

#: Dies by itself between the two renames that exchange a bundle.
REPLACER = """
import os, signal, sys
from pathlib import Path
from hf_qat.files.atomic import whole_directory

rename = os.rename
def die_after(source, target):
    rename(source, target)
    if "replaced-" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = die_after
with whole_directory(Path("bundle"), "artifacts") as bundle:
    (bundle / "SHA256SUMS").write_text("new")
"""

TEMPORARY = re.compile(r"\.(model\.onnx|bundle)-\w{8}\.incomplete")


@contextmanager
def writer(place: Path) -> Iterator[subprocess.Popen]:
    """Another process that is in the middle of writing; killed at the end unless it has ended."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def write(place: Path, content: str) -> None:
    with whole_file(place / "model.onnx") as file:
        file.write_text(content)
    with whole_directory(place / "bundle", "artifacts") as bundle:
        (bundle / MANIFEST).write_text(content)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def contents(place: Path) -> list[str]:
    return [(place / "bundle" / MANIFEST).read_text(), (place / "model.onnx").read_text()]


def test_what_killed_processes_left_goes_when_the_same_output_is_written_again(tmp_path: Path):
    for _ in range(2):
        with writer(tmp_path) as process:
            os.kill(process.pid, signal.SIGKILL)
    left = names(tmp_path)
    assert len(left) >= 2 and all(TEMPORARY.fullmatch(name) for name in left)
    write(tmp_path, "ours")
    assert names(tmp_path) == ["bundle", "model.onnx"] and contents(tmp_path) == ["ours", "ours"]


def test_the_first_process_to_be_killed_leaves_no_more_than_the_second(tmp_path: Path):
    counts = []
    for _ in range(3):
        with writer(tmp_path):
            counts.append(len(names(tmp_path)))
    assert counts == [2, 2, 2]


def test_what_a_living_process_is_writing_stays_and_it_completes(tmp_path: Path):
    with writer(tmp_path) as process:
        theirs = names(tmp_path)
        write(tmp_path, "ours")
        assert names(tmp_path) == sorted([*theirs, "bundle", "model.onnx"])
        assert contents(tmp_path) == ["ours", "ours"]
        process.stdin.close()
        assert process.wait() == 0
    assert names(tmp_path) == ["bundle", "model.onnx"]
    assert contents(tmp_path) == ["the other process's"] * 2


def test_a_bundle_whose_replacement_was_killed_half_way_is_back_before_a_new_one_is_written(tmp_path: Path):
    write(tmp_path, "old")
    assert subprocess.run([sys.executable, "-c", REPLACER], cwd=tmp_path).returncode == -signal.SIGKILL
    assert "bundle" not in names(tmp_path)
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "bundle", "artifacts"):
        raise ZeroDivisionError
    assert names(tmp_path) == ["bundle", "model.onnx"] and contents(tmp_path) == ["old", "old"]


def test_other_hidden_names_stay(tmp_path: Path):
    mine = [".model.onnx-20261126", ".model.onnx-backup.incomplete", ".other.onnx-abcd1234.incomplete", ".model.onnx"]
    for name in mine:
        (tmp_path / name).mkdir()
    write(tmp_path, "ours")
    assert names(tmp_path) == sorted([*mine, "bundle", "model.onnx"])


def test_where_the_system_has_no_locks_nothing_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = tmp_path / ".bundle-abcd1234.incomplete"
    (left / "replaced-bundle").mkdir(parents=True)
    (left / "replaced-bundle" / MANIFEST).write_text("old")
    monkeypatch.setattr("hf_qat.files.locks.fcntl", None)
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "bundle", "artifacts"):
        raise ZeroDivisionError
    assert (tmp_path / "bundle" / MANIFEST).read_text() == "old" and left.is_dir()


def test_a_new_directory_that_another_process_takes_for_a_killed_ones_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another one may come between making a directory and locking it."""
    made, make = [], aside._made

    def make_and_lose(path: Path) -> Path:
        made.append(make(path))
        if len(made) == 1:
            aside.settle(path)  # as another process would
            assert not made[0].exists()
        return made[-1]

    monkeypatch.setattr(aside, "_made", make_and_lose)
    write(tmp_path, "ours")
    assert len(made) == 3 and contents(tmp_path) == ["ours", "ours"]
