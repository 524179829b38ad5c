"""Whether a model returns a loss: it then runs in its own Python code, so that no loss is ever quantized."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from hf_qat.graph.capture.call_record import Search, is_with_loss
from hf_qat.graph.capture.dry_run import forward
from hf_qat.graph.capture.inputs import BATCH_SIZES, Inputs, TwoSizes
from hf_qat.graph.capture.labelled import FIXED
from hf_qat.graph.capture.rehearsal import Run, rehearse
from hf_qat.graph.capture.ways import labelled_forward


def returns_loss(model: nn.Module, inputs: Inputs | TwoSizes, labels: Mapping[str, Any]) -> bool:
    """Whether `model` itself returns a loss, without labels or with them; it runs on the side."""
    found: list[bool] = []
    runs: list[Run] = [partial(forward, inputs=inputs, size=BATCH_SIZES[0])]
    if labels:
        runs.append(partial(labelled_forward, inputs=inputs, labels=labels, size=FIXED[0]))
    for run in runs:
        look: Run = lambda candidate, run=run: found.append(is_with_loss(run(candidate)))  # type: ignore[misc]  # noqa: E731
        rehearse(model, False, [look], Search(opened=()))
    return any(found)
