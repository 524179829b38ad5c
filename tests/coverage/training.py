"""Training compared with the float model: outputs, gradients and buffers of one step, with the same random numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_qat import QATConfig, fake_quant_disabled, freeze_batch_norm, prepare_qat
from tests.coverage.case import Case


#: By name or position.
Tensors = dict[Any, Tensor | None]

#: Probabilities in configurations, and what they are set to, so that nothing is trained without its randomness.
RANDOMNESS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "drop_path_rate")
PROBABILITY = 0.2

#: Largest difference that counts as none: weights of convolutions are folded in another order.
EQUAL = 2e-3

#: Gradients smaller than this part of the largest one are nothing but rounding (of a bias that a batch norm takes
#: away), and are compared with it.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Parity:
    """The largest differences between a prepared model, its quantizers off, and the float model.

    Each is relative to the largest value of its tensor, and infinite where only one model has the tensor.

    Attributes:
        outputs, gradients, buffers: of a step of training.
    """

    outputs: float
    gradients: float
    buffers: float

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.outputs, self.gradients, self.buffers)


def parity_of(case: Case) -> Parity:
    """Prepare the model of a case, and compare a step of training with the float model's.

    Batch norms over a few values amplify rounding without bound, in the float model as well. A difference that is
    gone in float64 was nothing else; one that stays is what the prepared model does otherwise.
    """
    float_model = noisy(case)
    model = copy.deepcopy(float_model)
    prepare_qat(model, QATConfig(), case.labelled(2))
    state, float_state = copy.deepcopy(model.state_dict()), copy.deepcopy(float_model.state_dict())
    inputs = case.labelled(2, seed=7)
    parity = compare_steps(model, float_model, inputs)
    if parity.worst <= EQUAL:
        return parity
    for each, before in ((model, state), (float_model, float_state)):
        each.load_state_dict(before)
        each.zero_grad(set_to_none=True)
        each.double()
    return compare_steps(model, float_model, pytree.tree_map(_double, inputs))


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


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


def compare_steps(model: nn.Module, float_model: nn.Module, inputs: dict[str, Any]) -> Parity:
    """One step of both on the same inputs; the batch norms of the prepared `model` are made live."""
    freeze_batch_norm(model, False)
    with fake_quant_disabled(model):
        outputs, gradients, buffers = _step(model, copy.deepcopy(inputs))
    expected = _step(float_model, copy.deepcopy(inputs))
    assert len(outputs) == len(expected[0])
    largest = max((float(g.abs().max()) for g in expected[1].values() if g is not None), default=0.0)
    return Parity(
        _worst(dict(enumerate(outputs)), dict(enumerate(expected[0]))),
        _worst(gradients, expected[1], ROUNDING * largest),
        _worst(buffers, expected[2]),
    )


def _step(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], Tensors, Tensors]:
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
    buffers: Tensors = {
        name: buffer for name, buffer in model.named_buffers() if "_quantizer" not in name and "_constant_" not in name
    }
    return [x.detach() for x in outputs], gradients, buffers


def _worst(ours: Tensors, theirs: Tensors, size: float = 0.0) -> float:
    """The largest difference relative to the largest value; infinite where only one has a tensor."""
    found = [0.0]
    for name, expected in theirs.items():
        value = ours[name]
        if value is None or expected is None:
            found.append(0.0 if value is expected else float("inf"))
        elif expected.numel():
            scale = max(float(expected.abs().max()), size, 1e-12)
            found.append(float((value.float() - expected.float()).abs().max()) / scale)
    return float("nan") if any(x != x for x in found) else max(found)
