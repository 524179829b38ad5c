"""Ctrl-C and SIGTERM at every rename of a save, an export, a bundle and a training: the old or the new one is whole.

A process that is forked sends itself the signal, just before its k-th rename or just after it, for every k; before it
only, in training. Files are compared by their bytes with those of a run that nobody interrupted.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification, set_seed

from hf_qat import convert, export_onnx, export_tidl
from hf_qat.files.atomic import INCOMPLETE
from hf_qat.trainer.trainer import QATTrainer
from tests.faults.test_kills import is_whole_bundle, is_whole_onnx, whole_checkpoints
from tests.models import resnet
from tests.trainer.test_resuming import forked, in_a_process
from tests.training import arguments, images, recipe


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, and killed by a signal"),
]

SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: What a training ends with.
NEWEST = "checkpoint-2/model.safetensors"

#: Path of a file, and the SHA-256 of its content.
Tree = dict[str, str]


class Writes:
    """What writes: an old version first, which a new one then replaces."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is one for all processes, and dies held with the first
        self.batch = {"pixel_values": images(4)[:]["pixel_values"]}
        trainer = QATTrainer(
            resnet(), arguments(directory / "none"), qat_config=recipe(target="AM68A"), train_dataset=images(16)
        )
        trainer.calibrate()
        self.trainers = {"old": trainer, "new": copy.copy(trainer)}
        self.trainers["new"].model = copy.deepcopy(trainer.model)
        with torch.no_grad():
            self.trainers["new"].model.classifier[1].bias.add_(0.5)
        self.models: dict[str, nn.Module] = {
            name: convert(copy.deepcopy(t.model)) for name, t in self.trainers.items()
        }

    def save(self, place: Path, version: str) -> None:
        self.trainers[version].save_quantized(place)

    def export(self, place: Path, version: str) -> None:
        export_onnx(self.models[version], place / "model.onnx", self.batch, verify=False)

    def bundle(self, place: Path, version: str) -> None:
        export_tidl(self.models[version], place / "bundle", "AM68A", [self.batch], frames=1)

    def training(self, place: Path, version: str) -> None:
        """The old one has a checkpoint; the new one goes on from it, saves another one, and deletes the first."""
        set_seed(0)
        steps = 1 if version == "old" else 2
        saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
        args = arguments(place, max_steps=steps, lr_scheduler_type="constant", **saving)
        trainer = QATTrainer(resnet(), args, qat_config=recipe(), train_dataset=images(16))
        trainer.train(resume_from_checkpoint=any(place.glob("checkpoint-*")) or None)


def tree(place: Path) -> Tree:
    """All files but those on their way, which are hidden, or in a directory that begins with an underscore."""
    paths = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    return {
        path.as_posix(): hashlib.sha256((place / path).read_bytes()).hexdigest()
        for path in paths
        if not path.parts[0].startswith((".", "_"))
    }


def on_their_way(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if path.name.startswith((".", "_"))]


def interrupted(work: Callable[[], None], call: int, after: bool, by: int, pipe: int) -> None:
    """Do it, with a signal to this process at its rename of that number; how many there were goes to the pipe."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    number = itertools.count(1)
    count = 0

    def wrap(rename: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*paths: Any) -> None:
            nonlocal count
            count = next(number)
            if count == call and not after:
                os.kill(os.getpid(), by)
            rename(*paths)
            if count == call and after:
                os.kill(os.getpid(), by)

        return wrapped

    os.rename, os.replace = wrap(os.rename), wrap(os.replace)
    try:
        work()
    except KeyboardInterrupt:
        if by != signal.SIGINT:
            raise
    os.write(pipe, str(count).encode())


def in_a_fork(work: Callable[[int], object]) -> tuple[int, bytes]:
    """Its status, and what it wrote."""
    child, reader = forked(work)
    text = os.read(reader, 100)
    os.close(reader)
    return os.waitpid(child, 0)[1], text


def loads(kind: str, place: Path) -> None:
    """As those who get it would read it."""
    if kind == "save":
        AutoModelForImageClassification.from_pretrained(place)
    elif kind == "export":
        assert is_whole_onnx(place / "model.onnx")
    elif kind == "bundle":
        assert is_whole_bundle(place / "bundle")
    else:
        assert whole_checkpoints(place)


def is_refused(place: Path) -> None:
    """A model whose files are being moved has no weights, perhaps no config.json, and `from_pretrained` says so."""
    with pytest.raises((OSError, ValueError), match=r"no file named|Unrecognized model"):
        AutoModelForImageClassification.from_pretrained(place)


def interrupt_at_every_rename(kind: str, directory: Path) -> None:
    writes, directory = Writes(directory), directory / kind
    work = getattr(writes, kind)
    trees: dict[str, Tree] = {}
    for version in ("old", "new"):
        status, _ = in_a_fork(lambda pipe, version=version: work(directory / "straight", version))
        assert status == 0
        trees[version] = tree(directory / "straight")
        if version == "old":
            shutil.copytree(directory / "straight", directory / "old")
        assert in_a_fork(lambda pipe: loads(kind, directory / "straight"))[0] == 0
    assert trees["old"] != trees["new"]
    shutil.copytree(directory / "old", directory / "counted")
    renames = int(in_a_fork(partial(interrupted, partial(work, directory / "counted", "new"), 0, False, 0))[1])
    found = []
    sides = (False,) if kind == "training" else (False, True)
    for call, after, by in itertools.product(range(1, renames + 1), sides, SIGNALS):
        place = directory / f"{call}-{after}-{by}"
        shutil.copytree(directory / "old", place)
        status, _ = in_a_fork(partial(interrupted, partial(work, place, "new"), call, after, by))
        assert os.waitstatus_to_exitcode(status) == (0 if by == signal.SIGINT else -by), (call, after, by)
        found.append(verdict(kind, place, trees, by))
        assert in_a_fork(lambda pipe, place=place: work(place, "new"))[0] == 0
        assert_completed(kind, place, trees)
        shutil.rmtree(place)
    (directory / "found.json").write_text(json.dumps(found))


def assert_completed(kind: str, place: Path, trees: dict[str, Tree]) -> None:
    """What the next run has written is the new version, and nothing is left beside it."""
    if kind == "training":  # with nothing more to save, it deletes nothing either
        assert tree(place)[NEWEST] == trees["new"][NEWEST] and set(on_their_way(place)) <= {INCOMPLETE}
    else:
        assert tree(place) == trees["new"] and on_their_way(place) == []


def verdict(kind: str, place: Path, trees: dict[str, Tree], by: int) -> str:
    """Which version is there after the signal."""
    there = tree(place)
    if kind == "training":
        assert in_a_fork(lambda pipe: loads(kind, place))[0] == 0
        assert set(on_their_way(place)) <= {INCOMPLETE}
        whole = trees["new"] | trees["old"]
        names = [name for name in there if name.endswith(("model.safetensors", "optimizer.pt"))]
        assert all(whole[name] == there[name] for name in names)
        return "some"
    if by == signal.SIGINT:
        assert on_their_way(place) == []
    elif there not in trees.values():
        return set_aside(kind, place, there)
    return next(version for version in ("old", "new") if trees[version] == there)


def set_aside(kind: str, place: Path, there: Tree) -> str:
    """Between two renames of a directory, or of several files, the old ones lie aside, and nothing stands for them."""
    if kind == "bundle":
        assert there == {} and len(list(place.glob(".bundle-*.incomplete/replaced-bundle"))) == 1
    else:
        assert kind == "save" and not list(place.glob("*.safetensors"))
        assert in_a_fork(lambda pipe: is_refused(place))[0] == 0
    return "set aside"


@pytest.mark.parametrize("kind", ["save", "export", "bundle", "training"])
def test_nothing_is_lost_wherever_ctrl_c_or_sigterm_comes_between_two_renames(kind: str, tmp_path: Path):
    assert in_a_process(interrupt_at_every_rename, kind, tmp_path, limit=2900) == 0
    found = json.loads((tmp_path / kind / "found.json").read_text())
    assert len(found) >= {"save": 16, "export": 4, "bundle": 8, "training": 4}[kind]
    assert kind == "training" or {"old", "new"} <= set(found)
