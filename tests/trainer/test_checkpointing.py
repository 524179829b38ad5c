"""Trainer's gradient checkpointing: the same training, with layers that are computed twice."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_qat import QATConfig, calibrate, prepare_qat
from hf_qat.quantization.layers import QATLayer
from hf_qat.trainer.fsdp import shard
from tests.models import checkpoint_layers, vit
from tests.ranks import on_two_ranks
from tests.trainer.test_fsdp import PIXELS, accelerator
from tests.training import differing, trainer_of, values


#: Trainer's argument, whose name has changed.
FIELDS = {field.name for field in fields(TrainingArguments)}
NAME = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_it_trains_what_it_trains_without(how, tmp_path, monkeypatch):
    float_model, calls = vit(hidden_dropout_prob=0.1), []
    compute = QATLayer.compute
    monkeypatch.setattr(QATLayer, "compute", lambda layer, *rest: calls.append(layer) or compute(layer, *rest))
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(float_model)
        trainer = trainer_of(model, tmp_path, **{NAME: checkpointing}, **how)
        trainer.calibrate()
        calls.clear()
        trainer.train()
        found.append((values(model), len(calls)))
    (expected, once), (actual, twice) = found
    assert differing(actual, expected) == []
    assert twice > 1.5 * once


@pytest.mark.slow
def test_what_keeps_every_second_layer_keeps_it(tmp_path):
    trainer = trainer_of(vit(layers=4), tmp_path, **{NAME: True, f"{NAME}_kwargs": {"every_n_layers": 2}})
    if NAME == "gradient_checkpointing":
        pytest.skip("this version of transformers marks every layer")
    trainer.train()
    marked = [path for path, module in trainer.model.named_modules() if vars(module).get("gradient_checkpointing")]
    assert sum("layers." in path for path in marked) == 2


def _step(model: nn.Module) -> None:
    model.train()(PIXELS).logits.square().mean().backward()


def _checkpointed() -> nn.Module:
    torch.manual_seed(0)
    return calibrate(prepare_qat(vit(), QATConfig(), PIXELS), [PIXELS])


def _one_of_two(rank: int) -> dict[str, Tensor]:
    model = _checkpointed()
    checkpoint_layers(model)
    shard(model, accelerator())
    _step(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


@pytest.mark.slow
def test_two_processes_that_share_a_model_compute_blocks_again_as_one(tmp_path):
    results = on_two_ranks(_one_of_two, tmp_path)
    model = _checkpointed()
    _step(model)
    for found in results:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in found:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
        assert len(found) > 20
