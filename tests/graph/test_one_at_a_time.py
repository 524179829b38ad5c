"""Threads that prepare, load and export at a time, as servers and notebooks have them, against one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetForImageClassification

from hf_qat import calibrate, convert, export_onnx, prepare_qat
from tests.exported import run
from tests.models import HUGGING_FACE


THREADS = 4


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What each thread has computed; they begin together."""
    ready = Barrier(THREADS)

    def begin(number: int) -> Any:
        ready.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_thread_gets_the_model_that_it_would_get_alone(tmp_path: Path):
    model, pixels = HUGGING_FACE["resnet"].make(), HUGGING_FACE["resnet"].pixels(4)

    def quantized(number: int = 0) -> nn.Module:
        prepared = prepare_qat(copy.deepcopy(model), example_inputs=pixels)
        return convert(calibrate(prepared, [pixels]))

    def logits(of: nn.Module) -> Tensor:
        with torch.no_grad():
            logits: Tensor = of.eval()(pixels).logits
            return logits

    alone = quantized()
    expected = logits(alone)
    alone.save_pretrained(tmp_path / "int8")
    for made in at_once(lambda number: logits(quantized(number))):
        assert torch.equal(made, expected)
    for loaded in at_once(lambda number: logits(ResNetForImageClassification.from_pretrained(tmp_path / "int8"))):
        assert torch.equal(loaded, expected)
    copies = [copy.deepcopy(alone) for _ in range(THREADS)]
    for report in at_once(lambda number: export_onnx(copies[number], tmp_path / f"{number}.onnx", pixels[:1])):
        np.testing.assert_allclose(run(report.path, pixels[:1].numpy()), expected[:1], rtol=1e-4, atol=1e-5)
