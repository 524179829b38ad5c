"""Whatever fails while something is replaced, and wherever: the old or the new one is whole, and the next one goes on.

Every call that changes names on the disk is made to fail in turn: before it has done its work, after it, once, or from
then on, as after a kill. What is on the disk is read back by `os` alone.
"""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_qat.errors import ExportError
from hf_qat.files.atomic import (
    INCOMPLETE,
    MANIFEST,
    discard,
    put_back,
    put_in_place,
    whole_directory,
    whole_file,
    written_whole,
)


Tree = dict[str, str]

#: What changes names on the disk.
CALLS = ((os, "rename"), (os, "replace"), (shutil, "rmtree"))

#: An earlier model with two files of weights, and a new one with a single file; a directory in either.
OLD_MODEL = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model-00002-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old",
    "processor/a.json": "old",
}
NEW_MODEL = {"config.json": "new", "model.safetensors": "new", "processor/a.json": "new", "tokenizer.json": "new"}

#: What else lies in a directory that models are saved to.
OTHERS = {"notes.txt": "mine", "checkpoint-9/model.safetensors": "mine"}


def write(directory: Path, files: Tree) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def read(directory: Path) -> Tree:
    """Content by path; without what is on its way, which is hidden or begins with an underscore."""
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file() and not path.relative_to(directory).parts[0].startswith((".", "_"))
    }


def save_file(place: Path, content: str) -> None:
    with whole_file(place / "model.onnx") as path:
        path.write_text(content)


def save_bundle(place: Path, content: str) -> None:
    with whole_directory(place / "bundle", "artifacts") as made:
        write(made, {MANIFEST: content, "model/model.onnx": content})


def save_model(place: Path, content: str) -> None:
    with written_whole(place) as made:
        write(made, OLD_MODEL if content == "old" else NEW_MODEL)


def save_checkpoint(place: Path, content: str) -> None:
    """As a Trainer does."""
    put_back(place)
    discard(place / INCOMPLETE)
    write(place / INCOMPLETE / "checkpoint-1", {"model.safetensors": content, "trainer_state.json": content})
    put_in_place(place / INCOMPLETE / "checkpoint-1", place / "checkpoint-1")
    discard(place / INCOMPLETE)


SAVES: dict[str, Callable[[Path, str], None]] = {
    "file": save_file,
    "bundle": save_bundle,
    "model": save_model,
    "checkpoint": save_checkpoint,
}


@contextmanager
def failing(call: int, error: type[BaseException], after: bool = False, last: str = "once") -> Iterator[list[str]]:
    """Let the call of that number fail, of all in `CALLS` together; yields the names of those that were made.

    Args:
        after: the call has done its work.
        last: fail once; "for good", so do all calls after it; or only "renames for good".
    """
    made: list[str] = []

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            made.append(name)
            fails = len(made) - 1 == call if last == "once" else len(made) - 1 >= call
            fails = fails and not (last == "renames for good" and name == "rmtree")
            if fails and not after:
                raise error(f"{name} was made to fail")
            result = real(*args, **kwargs)
            if fails:
                raise error(f"{name} was made to fail when it was done")
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, wrap(name, getattr(module, name)))
        yield made


@pytest.mark.parametrize("last", ["once", "for good", "renames for good"])
@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "when it is done"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("kind", SAVES)
def test_the_old_or_the_new_one_is_whole_whichever_call_fails_and_the_next_save_goes_on(
    kind: str, error: type[BaseException], after: bool, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of saves; it has a test of its own
    save = SAVES[kind]
    for call in itertools.count():
        place = tmp_path / str(call)
        place.mkdir()
        write(place, OTHERS)
        save(place, "old")
        old = read(place)
        with failing(call, error, after, last) as made:
            try:
                save(place, "new")
                interrupted = False
            except error:
                interrupted = True
        if last != "once" and interrupted:  # a new process, which fails in its turn, while it writes
            with pytest.raises(ZeroDivisionError):
                fail_while_writing(kind, place)
        assert read(place) in (old, expected_of(kind, old)), f"call {call}, {made}"
        save(place, "new")
        assert read(place) == expected_of(kind, old)
        if not interrupted:
            break
    assert len(made) >= (2 if kind == "file" else 3)
    assert not (place / INCOMPLETE).exists()


def expected_of(kind: str, old: Tree) -> Tree:
    """What is there after the new one was saved, by hand."""
    if kind == "model":
        return OTHERS | NEW_MODEL
    return {name: "mine" if name in OTHERS else "new" for name in old}


def fail_while_writing(kind: str, place: Path) -> None:
    """A save that gets no further than to its first file."""
    writers = {
        "file": lambda: whole_file(place / "model.onnx"),
        "bundle": lambda: whole_directory(place / "bundle", "artifacts"),
        "model": lambda: written_whole(place),
        "checkpoint": lambda: discarding(place),
    }
    with writers[kind]():
        raise ZeroDivisionError


@contextmanager
def discarding(place: Path) -> Iterator[None]:
    put_back(place)
    discard(place / INCOMPLETE)
    yield


@pytest.mark.parametrize("kind", ["model", "bundle", "checkpoint"])
def test_a_deletion_that_stops_half_way_takes_nothing_of_the_new_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    delete = shutil.rmtree

    def delete_one(directory: Path) -> None:
        min(path for path in directory.rglob("*") if path.is_file()).unlink()
        for inner in [path for path in directory.iterdir() if path.is_dir()]:
            if not any(path.is_file() for path in inner.rglob("*")):
                delete(inner)
        raise KeyboardInterrupt

    write(tmp_path, OTHERS)
    SAVES[kind](tmp_path, "old")
    old = read(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", delete_one)
        SAVES[kind](tmp_path, "new")
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(kind, tmp_path)
    assert read(tmp_path) == expected_of(kind, old)


def test_a_first_model_is_there_as_a_whole_or_not_at_all(tmp_path: Path):
    for call in itertools.count():
        place = tmp_path / str(call)
        with failing(call, KeyboardInterrupt):
            try:
                save_model(place, "new")
                break
            except KeyboardInterrupt:
                assert read(place) in ({}, NEW_MODEL)
    assert call > len(NEW_MODEL)


def test_what_was_there_before_a_kill_comes_back_though_the_next_save_fails(tmp_path: Path):
    """Where a save died while it moved weights, the next one that failed used to delete what was complete."""
    save_model(tmp_path, "old")
    with pytest.raises(KeyboardInterrupt), failing(2, KeyboardInterrupt, last="for good"):
        save_model(tmp_path, "new")
    with pytest.raises(ZeroDivisionError):
        fail_while_writing("model", tmp_path)
    assert read(tmp_path) == OLD_MODEL


def test_a_name_that_is_taken_by_a_directory_is_refused_before_anything_is_moved(tmp_path: Path):
    save_model(tmp_path, "old")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"tokenizer\.json"):
        save_model(tmp_path, "new")
    assert read(tmp_path) == OLD_MODEL and not (tmp_path / INCOMPLETE).exists()


def test_a_file_has_the_permissions_of_any_other_new_one(tmp_path: Path):
    (tmp_path / "plain").write_text("")
    save_file(tmp_path, "new")
    assert stat.S_IMODE((tmp_path / "model.onnx").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr("os.fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b: (order.append("->"), replace(a, b)))
    monkeypatch.setattr("os.rename", lambda a, b: (order.append("->"), rename(a, b)))
    save_file(tmp_path, "new")
    assert [name for name in order if name.endswith("model.onnx")] == [order[0]] and "->" in order
    order.clear()
    save_bundle(tmp_path, "new")
    assert {Path(name).name for name in order[: order.index("->")]} >= {MANIFEST, "model.onnx", "model", "bundle"}


def test_a_bundle_replaces_nothing_but_a_bundle_without_compiled_artifacts(tmp_path: Path):
    write(tmp_path, {"bundle/mine": "mine", "file": "mine", "other/artifacts": "compiled", f"other/{MANIFEST}": ""})
    for name, message in (("bundle", "is not empty"), ("file", "it is a file"), ("other", "compiled model")):
        with pytest.raises(ExportError, match=message), whole_directory(tmp_path / name, "artifacts"):
            pytest.fail("nothing is to be written")
    assert read(tmp_path)["bundle/mine"] == "mine"


def test_two_processes_may_write_the_same_file_and_the_last_one_wins(tmp_path: Path):
    with whole_file(tmp_path / "model.onnx") as first:
        first.write_text("first")
        with whole_file(tmp_path / "model.onnx") as second:
            second.write_text("second")
        assert (tmp_path / "model.onnx").read_text() == "second"
    assert (tmp_path / "model.onnx").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_not_written_in_the_place_of_a_directory_nor_below_a_file(tmp_path: Path):
    write(tmp_path, {"model.onnx/mine": "mine", "file": "mine"})
    before = read(tmp_path)
    for path, message in ((tmp_path / "model.onnx", "it is a directory"), (tmp_path / "file/model.onnx", "may write")):
        with pytest.raises(ExportError, match=f"cannot write {path}.*{message}"), whole_file(path):
            pytest.fail("nothing is to be written")
    assert read(tmp_path) == before and {path.name for path in tmp_path.iterdir()} == {"model.onnx", "file"}


def test_a_checkpoint_is_deleted_whole_though_another_one_was_killed_while_it_was_written(tmp_path: Path):
    write(tmp_path, {"checkpoint-1/model.safetensors": "old", f"{INCOMPLETE}/checkpoint-2/half": "half"})
    write(tmp_path, {f"{INCOMPLETE}/replaced-checkpoint-3/model.safetensors": "set aside"})
    discard(tmp_path / "checkpoint-1")
    assert read(tmp_path) == {"checkpoint-3/model.safetensors": "set aside"}
    assert not (tmp_path / INCOMPLETE).exists()
