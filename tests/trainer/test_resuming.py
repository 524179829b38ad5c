"""Processes that are really killed, in training and in saving: nothing is lost, and what goes on has the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_qat.errors import WeightsError
from hf_qat.files.atomic import INCOMPLETE
from hf_qat.trainer.trainer import QATTrainer
from tests.models import resnet
from tests.training import FOLLOWED, arguments, images, recipe, trainer_of, vit


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, and killed by a signal"),
]

#: Its server imports once what takes seconds; a process that it forks has nothing else of any other one.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, "tests.warmed"])


def in_a_process(function: Callable[..., None], *values: object, limit: float = 240) -> int:
    """The exit code of `function(*values)` in a process of its own, which may take `limit` seconds."""
    process = FORKED.Process(target=function, args=values)
    process.start()
    process.join(limit)
    assert process.exitcode is not None
    return process.exitcode


# Killed in training

STEPS = 8
#: Steps in which a training is killed, after the first of its two accumulated batches; one in each phase.
KILLED_IN = (1, 4, 7)
PHASES = ["batch norm live", "batch norm frozen", "ranges frozen"]
TRAININGS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "learned": (resnet, {}),
    "followed": (resnet, FOLLOWED),
    "with dropout": (partial(vit, hidden_dropout_prob=0.1), {}),
}


class Killed(TrainerCallback):
    """By SIGKILL, half way through a step: nothing that Python would do at its end is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(name: str, directory: Path, resume: bool, kill_in: int) -> None:
    """Two accumulated batches a step, two steps an epoch, a warm-up, and a checkpoint after every step."""
    torch.set_num_threads(1)
    make, scheme = TRAININGS[name]
    model = make()
    if resume:  # whatever the checkpoint does not give back shows
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data += 1
    trainer = trainer_of(
        model,
        directory,
        qat={**scheme, "freeze_bn_at": 0.25, "freeze_ranges_at": 0.625},
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=1,
        callbacks=[Killed(kill_in)],
    )
    trainer.train(resume_from_checkpoint=resume or None)


def contents(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint, as plain data and tensors."""
    found: dict[str, Any] = {}
    for file in sorted(checkpoint.iterdir()):
        if file.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(_numpy_globals()):
                found[file.name] = torch.load(file, weights_only=True)
        elif file.name == "trainer_state.json":
            found[file.name] = state = json.loads(file.read_text())
            for entry in state["log_history"]:
                for counted_from_where_a_run_began in ("qat_scale_drift", "qat_oscillating_weights"):
                    entry.pop(counted_from_where_a_run_began, None)
        elif file.name != "training_args.bin":  # holds the directory
            found[file.name] = file.read_bytes()
    return found


def _numpy_globals() -> list[Any]:
    """What the random state of numpy is made of."""
    import numpy as np

    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def differences(one: Path, other: Path) -> list[str]:
    """Where two checkpoints differ, in any bit of anything."""
    left, right = contents(one), contents(other)
    assert left.keys() == right.keys()
    return [name for name in left if not _same(left[name], right[name])]


def _same(left: Any, right: Any) -> bool:
    (mine, spec), (others, other_spec) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    return spec == other_spec and all(map(_same_leaf, mine, others))


def _same_leaf(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool((left == right).all()) if hasattr(left, "all") else bool(left == right)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_is_killed_in_every_phase_ends_with_the_same_bits(name: str, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert in_a_process(train, name, straight, False, -1) == 0
    for step in (*KILLED_IN, -1):
        assert in_a_process(train, name, killed, step != KILLED_IN[0], step) == (-signal.SIGKILL if step > 0 else 0)
        if step > 0:
            assert get_last_checkpoint(str(killed)) == str(killed / f"checkpoint-{step}")
    phases = []
    for step in range(1, STEPS + 1):
        assert differences(straight / f"checkpoint-{step}", killed / f"checkpoint-{step}") == [], step
        state = contents(killed / f"checkpoint-{step}")["trainer_state.json"]
        phases.append(state["stateful_callbacks"]["ScheduleCallback"]["attributes"]["progress"]["phase"])
    assert [phases[step - 1] for step in KILLED_IN] == PHASES


# Killed in saving

KILLS = 50


class Announcing(QATTrainer):
    """Says on a pipe when it begins to save a checkpoint, and when it is done."""

    pipe: int

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        os.write(self.pipe, b"(")
        super()._save_checkpoint(model, trial)
        os.write(self.pipe, b")")


def forked(work: Callable[[int], object]) -> tuple[int, int]:
    """Process number of a copy of this process that does `work`, and a pipe on which it says what it does."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(writer)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    return child, reader


def kill(child: int, reader: int, by: int = signal.SIGKILL) -> bool:
    """Whether the process was still there to be killed."""
    os.kill(child, by)
    os.close(reader)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed_while_saving(directory: Path) -> None:
    """Train straight, saving every step; then be killed `KILLS` times in saving, each time going on from the last."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is one for all processes, and dies held with the first
    moments = random.Random(0)
    args = arguments(directory, max_steps=90, save_strategy="steps", save_steps=1)
    trainer = Announcing(resnet(), args, qat_config=recipe(), train_dataset=images(16))
    trainer.calibrate()

    def go(where: str, limit: int | None, pipe: int) -> None:
        set_seed(0)  # Python draws a new seed of its own in a process that is forked
        trainer.pipe, args.output_dir, args.save_total_limit = pipe, str(directory / where), limit
        (directory / where).mkdir(exist_ok=True)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(directory / where))

    child, reader = forked(partial(go, "straight", None))
    times = {b"(": [], b")": []}
    while mark := os.read(reader, 1):
        times[mark].append(time.perf_counter())
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    typical = sorted(end - start for start, end in zip(times[b"("], times[b")"], strict=True))[45]
    found = []
    while len(found) < KILLS:
        child, reader = forked(partial(go, "killed", 2))
        for _ in range(moments.choice([1, 3])):
            os.read(reader, 1)
        time.sleep(moments.uniform(0, 1.1 * typical))
        if kill(child, reader):
            found.append(_state_of(directory))
    (directory / "found.json").write_text(json.dumps(found))


def _state_of(directory: Path) -> dict[str, Any]:
    killed = directory / "killed"
    there = sorted(int(path.name.rpartition("-")[2]) for path in killed.glob("checkpoint-*"))
    different = {
        step: differences(directory / f"straight/checkpoint-{step}", killed / f"checkpoint-{step}") for step in there
    }
    return {"there": there, "different": different, "in the middle": (killed / INCOMPLETE).exists()}


def test_a_training_that_is_killed_again_and_again_in_saving_loses_nothing(tmp_path: Path):
    assert in_a_process(killed_while_saving, tmp_path) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == KILLS
    assert sum(state["in the middle"] for state in found) >= 10  # otherwise this test shows little
    for state in found:
        assert [step for step, names in state["different"].items() if names] == []
    newest = [max(state["there"], default=0) for state in found]
    assert newest == sorted(newest) and newest[-1] > 15
    assert max(len(state["there"]) for state in found) <= 3  # two, and one that was about to go


#: Makes a file that takes long enough to write to be killed in the middle.
MANY_LABELS = 100_000


def killed_while_saving_models(directory: Path) -> None:
    """A model is saved over and over, in one directory by the Trainer and in new ones by itself."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    moments = random.Random(1)
    model = vit()
    model.config.num_labels, model.classifier = MANY_LABELS, nn.Linear(16, MANY_LABELS)
    trainer = QATTrainer(model, arguments(directory), qat_config=recipe())

    def go(save: Callable[[int], None], pipe: int) -> None:
        for version in range(1000):
            model.classifier.bias.data.fill_(float(version))
            os.write(pipe, b"(")
            save(version)

    def killed_in(save: Callable[[int], None], seconds: float) -> None:
        child, reader = forked(partial(go, save))
        os.read(reader, 1 + moments.randrange(2))
        time.sleep(moments.uniform(0, seconds))
        assert kill(child, reader)

    model.classifier.bias.data.fill_(-1.0)  # what is there if the first kill comes before the first version
    start = time.perf_counter()
    trainer.save_model(str(directory / "trainer"))
    seconds = time.perf_counter() - start
    by_trainer, by_itself = [], []
    for _ in range(20):
        killed_in(lambda version: trainer.save_model(str(directory / "trainer")), 2 * seconds)
        by_trainer.append(_verdict(directory / "trainer", model))
    for number in range(6):
        place = directory / f"model-{number}"
        place.with_name(f"{place.name}-0").mkdir()
        killed_in(lambda version, place=place: model.save_pretrained(f"{place}-{version}"), seconds)
        latest = max(directory.glob(f"{place.name}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        by_itself.append(_verdict(latest, model))
    (directory / "found.json").write_text(json.dumps({"by trainer": by_trainer, "by itself": by_itself}))


def _verdict(directory: Path, model: nn.Module) -> str:
    """Whether what lies there is one whole model, or refused by `from_pretrained`.

    In a process of its own: loading starts threads, and a process with threads cannot be forked.
    """
    child, reader = forked(lambda pipe: os.write(pipe, _judge(directory, model).encode()))
    verdict = os.read(reader, 100).decode()
    os.close(reader)
    os.waitpid(child, 0)
    return verdict


def _judge(directory: Path, model: nn.Module) -> str:
    try:
        json.loads((directory / "config.json").read_text())
        found = load_file(directory / "model.safetensors")
    except (OSError, ValueError, SafetensorError):
        try:
            type(model).from_pretrained(directory)
        except (OSError, WeightsError):
            return "refused"
        return "taken for whole"
    expected = model.state_dict()
    expected["classifier.bias"] = found["classifier.bias"][0].expand(MANY_LABELS)
    same = expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    return "whole" if same else "of two models"


def test_a_model_whose_saving_is_killed_is_whole_or_refused(tmp_path: Path):
    assert in_a_process(killed_while_saving_models, tmp_path) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["by trainer"]) == 20 and set(found["by trainer"]) <= {"whole", "refused"}
    assert found["by trainer"].count("whole") >= 15
    assert len(found["by itself"]) == 6 and set(found["by itself"]) <= {"whole", "refused"}
