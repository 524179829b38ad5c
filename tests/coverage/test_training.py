"""What is trained is the user's model: with gradients and randomness on, it equals the float model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat import QATConfig, fake_quant_disabled, freeze_batch_norm, prepare_qat
from tests.coverage.case import Case
from tests.coverage.models import CASES, SAMPLE


#: By name or position.
Tensors = dict[Any, Tensor | None]

#: Largest difference relative to the largest value of a tensor: weights of convolutions are folded in another order.
TOLERANCE = 2e-3

#: Probabilities in configurations, and what they are set to, so that nothing is trained without its randomness.
RANDOMNESS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "drop_path_rate")
PROBABILITY = 0.2


def noisy(case: Case) -> nn.Module:
    """The model of a case, with dropout and stochastic depth as far as its class has them."""

    def config() -> Any:
        assert case.config is not None
        made = case.config()
        for part in (made, getattr(made, "backbone_config", None), getattr(made, "vision_config", None)):
            for name in RANDOMNESS:
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, PROBABILITY)
        return made

    changed = Case(**{**vars(case), "config": None if case.config is None else config})
    model = changed.make()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
    """Outputs, gradients and buffers of a step in training mode, with random numbers that are always the same."""
    model.train()
    torch.manual_seed(5)
    result = model(**inputs)
    outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    loss = result["loss"] if isinstance(result, dict) and result.get("loss") is not None else None
    if loss is None:
        loss = sum((x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in outputs if x.requires_grad)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "_quantizer" not in name}
    buffers = {
        name: buffer for name, buffer in model.named_buffers() if "_quantizer" not in name and "_constant_" not in name
    }
    return [x.detach() for x in outputs], gradients, buffers


def differences(
    ours: dict[Any, Tensor | None], theirs: dict[Any, Tensor | None], size: float = 0.0
) -> dict[Any, float]:
    """By name, the largest difference relative to the largest value; infinite where only one has a tensor."""
    found = {}
    for name, expected in theirs.items():
        value = ours[name]
        if value is None or expected is None:
            found[name] = 0.0 if value is expected else float("inf")
            continue
        scale = max(float(expected.abs().max()) if expected.numel() else 0.0, size, 1e-12)
        found[name] = float((value.float() - expected.float()).abs().max()) / scale if expected.numel() else 0.0
    return found


def worst(found: dict[Any, float]) -> tuple[Any, float]:
    return max(found.items(), key=lambda item: item[1], default=("", 0.0))


def param(case: Case) -> Any:
    marks = [] if case.title in SAMPLE else [pytest.mark.slow]
    return pytest.param(case, id=f"{case.task}: {case.title}", marks=marks)


@pytest.mark.parametrize("case", [param(case) for case in CASES])
def test_a_step_of_training_is_that_of_the_float_model(case):
    float_model = noisy(case)
    model = copy.deepcopy(float_model)
    prepare_qat(model, QATConfig(), case.batch(2))
    freeze_batch_norm(model, False)
    inputs = case.labelled(2, seed=7)
    with fake_quant_disabled(model):
        ours = step(model, copy.deepcopy(inputs))
    theirs = step(float_model, copy.deepcopy(inputs))
    assert len(ours[0]) == len(theirs[0])
    assert worst(differences(dict(enumerate(ours[0])), dict(enumerate(theirs[0]))))[1] < TOLERANCE
    largest = max((float(g.abs().max()) for g in theirs[1].values() if g is not None), default=0.0)
    # Gradients that are nothing but rounding (of a bias that a batch norm takes away) are compared with the largest.
    assert worst(differences(ours[1], theirs[1], 1e-3 * largest))[1] < TOLERANCE
    assert worst(differences(ours[2], theirs[2]))[1] < TOLERANCE
