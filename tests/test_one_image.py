"""CONTRIBUTING's way of one image, from `QATTrainer.train()` to a Q/DQ pair, is the way that one takes."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

from hf_qat import export_onnx
from tests.models import resnet
from tests.structure import ROOT
from tests.training import images, trainer_of


#: `name` (`file`, inherited from `other`), at the beginning of a numbered line.
STEP = re.compile(r"^\d+\. `([\w.]+)` \(`([\w/]+)\.py`", re.MULTILINE)


def documented() -> list[str]:
    """What CONTRIBUTING names, as `module:function` or `module:Class.method`."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## One image")[2].partition("\n## ")[0]
    return [f"hf_qat.{file.replace('/', '.')}:{name}" for name, file in STEP.findall(section)]


def code_of(step: str) -> CodeType:
    """Of the function itself, below its decorators."""
    module, _, name = step.partition(":")
    function: object = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return inspect.unwrap(function).__code__  # type: ignore[arg-type]


@contextmanager
def recorded(steps: dict[CodeType, str]) -> Iterator[list[str]]:
    """Which of `steps` are called inside, in order."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in steps:
            calls.append(steps[frame.f_code])

    before: Callable[..., object] | None = sys.getprofile()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def test_one_image_meets_the_functions_of_contributing_in_their_order(tmp_path):
    steps = documented()
    assert 3 <= len(steps) <= 7
    assert {"run_graph", "compute"} <= {step.rpartition(".")[2] for step in steps}
    trainer = trainer_of(resnet(), tmp_path, train_dataset=images(1), max_steps=1)
    trainer.calibrate()
    with recorded({code_of(step): step for step in steps}) as calls:
        trainer.train()
        model = trainer.convert()
        export_onnx(model, tmp_path / "model.onnx")
    at = -1
    for step in steps:
        assert step in calls[at + 1 :], f"{step} is not called after those that CONTRIBUTING names before it"
        at = calls.index(step, at + 1)
    first = {step: calls.index(step) for step in steps}
    assert first[steps[0]] == 0 and max(first, key=first.__getitem__) == steps[-1]
