"""A model that two processes share; how a whole training goes on is in test_distributed.py."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import OffloadPolicy, StateDictType

from hf_qat.model.parameter_groups import scale_parameters
from hf_qat.model.prepare import prepare_qat
from hf_qat.trainer.fsdp import gathered, is_sharded, saved_whole, shard
from tests.models import resnet
from tests.ranks import on_two_ranks
from tests.training import recipe


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def accelerator(kind: StateDictType = StateDictType.SHARDED_STATE_DICT) -> Accelerator:
    """What is read of one with FSDP2 in two processes on the CPU."""
    plugin = SimpleNamespace(cpu_offload=OffloadPolicy(), state_dict_type=kind)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(torch_device_mesh=None, device=torch.device("cpu"), num_processes=2, state=state)


def prepared() -> nn.Module:
    return prepare_qat(resnet(), recipe(), PIXELS).eval()


def one_of_two(rank: int) -> dict[str, object]:
    model = prepared()
    shard(model, accelerator())
    weight = model.classifier[1].weight
    local = weight.to_local().clone()
    with gathered(model):
        whole = model.classifier[1].weight.detach().clone()
    copied = copy.deepcopy(model)
    return {
        "sharded": (is_sharded(model), is_sharded(copied)),
        "local": local,
        "gathered": whole,
        "scales": [tuple(scale.shape) for scale in scale_parameters(model)],
        "logits": model(PIXELS).logits.detach(),
        "logits of the copy": copied(PIXELS).logits.detach(),
    }


@pytest.mark.slow
def test_two_processes_hold_a_part_each_and_compute_as_one(tmp_path: Path):
    parts = on_two_ranks(one_of_two, tmp_path)
    model = prepared()
    with torch.no_grad():
        expected, weight = model(PIXELS).logits, model.classifier[1].weight
    assert torch.equal(torch.cat([part["local"] for part in parts]), weight)
    for part in parts:
        assert part["sharded"] == (True, False)
        assert torch.equal(part["gathered"], weight)
        assert part["scales"] == [tuple(scale.shape) for scale in scale_parameters(model)]
        assert torch.equal(part["logits"], expected) and torch.equal(part["logits of the copy"], expected)


def test_a_whole_model_is_read_as_it_is():
    model = nn.Linear(2, 2)
    with gathered(model):
        assert not is_sharded(model)


def test_what_is_saved_is_whole_whatever_the_plugin_says_and_the_plugin_keeps_what_it_said():
    chosen = accelerator()
    with pytest.raises(ZeroDivisionError), saved_whole(chosen):
        assert chosen.state.fsdp_plugin.state_dict_type == StateDictType.FULL_STATE_DICT
        raise ZeroDivisionError
    assert chosen.state.fsdp_plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
