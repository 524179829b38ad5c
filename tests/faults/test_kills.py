"""Processes killed at random moments of a whole run: what was complete is whole, and the next run goes on.

All of them: `python -m pytest tests/faults/test_kills.py`; `SEEDS` times `KILLS` is their number.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_qat import convert, export_onnx, export_tidl
from hf_qat.files.atomic import INCOMPLETE, MANIFEST
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet
from tests.trainer.test_resuming import Announcing, forked, in_a_process, kill
from tests.training import arguments, images, recipe


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, and killed by a signal"),
]

#: Each seed with its signal: nothing that Python would do at its end is done at the first, and nothing at the second
#: either, as Python leaves it to the system.
SEEDS = ((0, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGKILL), (3, signal.SIGKILL), (4, signal.SIGTERM))
KILLS = 55

#: What is killed.
PHASES = ("calibration", "training", "saving", "export", "bundle")


class Run:
    """A run in a directory, up to where its parts can be started and killed: in a fork of this process."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is one for all processes, and dies held with the first
        self.directory, self.batch = directory, {"pixel_values": images(4)[:]["pixel_values"]}
        args, qat = self._arguments(directory / "run"), recipe(target="AM68A")
        self.trainer = Announcing(resnet(), args, qat_config=qat, train_dataset=images(16))
        self.trainer.calibrate()
        self.converted = convert(copy.deepcopy(self.trainer.model))

    @staticmethod
    def _arguments(directory: Path) -> Any:
        return arguments(directory, max_steps=100_000, save_strategy="steps", save_steps=2, save_total_limit=2)

    def calibration(self, pipe: int) -> None:
        os.write(pipe, b"(")
        args = self._arguments(self.directory / "run")
        while True:
            QATTrainer(resnet(), args, qat_config=recipe(), train_dataset=images(16)).calibrate()

    def training(self, pipe: int) -> None:
        set_seed(0)  # Python draws a new seed of its own in a process that is forked
        self.trainer.pipe = pipe
        self.trainer.train(resume_from_checkpoint=get_last_checkpoint(self.directory / "run"))

    saving = training

    def export(self, pipe: int) -> None:
        while True:
            os.write(pipe, b"(")
            export_onnx(self.converted, self.directory / "model.onnx", self.batch, verify=False)
            os.write(pipe, b")")

    def bundle(self, pipe: int) -> None:
        while True:
            os.write(pipe, b"(")
            export_tidl(self.converted, self.directory / "bundle", "AM68A", [self.batch], frames=2)
            os.write(pipe, b")")


def whole_checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints; each is read in full."""
    steps = []
    for checkpoint in run.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        json.loads((checkpoint / "config.json").read_text())
        assert all(bool(x.isfinite().all()) for x in load_file(checkpoint / "model.safetensors").values())
        with torch.serialization.safe_globals([]):
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
        steps.append(int(checkpoint.name.rpartition("-")[2]))
        assert state["global_step"] == steps[-1]
    return sorted(steps)


def is_whole_onnx(file: Path) -> bool:
    import onnx

    onnx.checker.check_model(onnx.load(file), full_check=True)
    return True


def is_whole_bundle(directory: Path) -> bool:
    """By its own list of SHA-256, which names every file."""
    lines = (directory / MANIFEST).read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - {MANIFEST}
    return files == listed.keys() and all(
        hashlib.sha256((directory / name).read_bytes()).hexdigest() == listed[name] for name in files
    )


def verdict(directory: Path) -> dict[str, Any]:
    """What is there after a kill; raises where something that has its name is not whole."""
    if (directory / "model.onnx").exists():
        assert is_whole_onnx(directory / "model.onnx")
    if (directory / "bundle").exists():
        assert is_whole_bundle(directory / "bundle")
    left = [
        path.name for path in directory.iterdir() if path.name not in ("run", "model.onnx", "bundle", "found.json")
    ]
    others = [path.name for path in (directory / "run").iterdir() if not path.name.startswith("checkpoint-")]
    return {"steps": whole_checkpoints(directory / "run"), "left": left, "others": others}


def kill_again_and_again(directory: Path, seed: int, by: int) -> None:
    """Measure each part once; then kill at moments drawn at random, and look at what is there."""
    run, draw = Run(directory), random.Random(seed)
    (directory / "run").mkdir(exist_ok=True)
    seconds = {phase: _duration(partial(_once, getattr(run, phase))) for phase in ("export", "bundle")}
    seconds |= {"calibration": 1.5, "training": 1.5, "saving": 0.1}
    found = []
    for number in range(KILLS):
        phase = PHASES[number % len(PHASES)]
        child, reader = forked(getattr(run, phase))
        for _ in range(draw.choice([1, 3]) if phase == "saving" else 1):
            os.read(reader, 1)
        delay = draw.uniform(0, 1.2 * seconds[phase])
        time.sleep(delay)
        assert kill(child, reader, by), phase  # it was still there
        found.append({"phase": phase, "seed": seed, "delay": delay, **_apart(partial(verdict, directory))})
    (directory / "found.json").write_text(json.dumps(found))


def _once(work: Callable[[int], None], pipe: int) -> None:
    """Until its first end is announced."""

    class Done(Exception):
        pass

    writes = os.write

    def write(pipe: int, mark: bytes) -> None:
        if mark == b")":
            raise Done
        writes(pipe, mark)

    os.write = write
    try:
        work(pipe)
    except Done:
        pass


def _duration(work: Callable[[int], None]) -> float:
    start = time.perf_counter()
    child, reader = forked(work)
    while os.read(reader, 1):
        pass
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    return time.perf_counter() - start


def _apart(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a function in a process of its own: reading starts threads, and those cannot be forked."""
    child, reader = forked(lambda pipe: os.write(pipe, json.dumps(look()).encode()))
    text = b""
    while part := os.read(reader, 65536):
        text += part
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    result: dict[str, Any] = json.loads(text)
    return result


@pytest.mark.parametrize(("seed", "by"), SEEDS)
def test_nothing_that_was_complete_is_lost_wherever_a_process_is_killed(seed: int, by: int, tmp_path: Path):
    assert in_a_process(kill_again_and_again, tmp_path, seed, by, limit=2900) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert Counter(entry["phase"] for entry in found) == dict.fromkeys(PHASES, KILLS // len(PHASES))
    newest = [max(entry["steps"], default=0) for entry in found]
    assert newest == sorted(newest) and newest[-1] > newest[0]  # no completed save is lost, and runs go on
    for entry in found:
        assert set(entry["others"]) <= {INCOMPLETE}, entry
        assert all(name.startswith((".model.onnx-", ".bundle-")) for name in entry["left"]), entry
        outputs = Counter(name.split("-")[0] for name in entry["left"])
        assert max(outputs.values(), default=0) <= 1, entry  # of the last process; it deleted what those before left
    assert any(entry["others"] or entry["left"] for entry in found)  # some were killed in the middle
