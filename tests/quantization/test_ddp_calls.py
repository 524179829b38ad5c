"""What DDP cannot wait for is said before it fails in words of its own: by the real one, with a process to itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from hf_qat import QATConfig, QATSchedule, calibrate, freeze_batch_norm, freeze_ranges, prepare_qat
from hf_qat.errors import StageError
from hf_qat.quantization import ddp_calls
from tests.models import made_once, spread


FOLLOWED = {"learned": False, "observer": "moving_average"}


@pytest.fixture(autouse=True)
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One, which looks as if it were not alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(ddp_calls, "is_active", lambda: True)
    yield
    dist.destroy_process_group()


@made_once
def prepared(**qat: object) -> nn.Module:
    """A layer with a batch norm, and a batch norm without a layer."""
    torch.manual_seed(0)
    model = spread(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    return calibrate(prepare_qat(model, QATConfig(**qat), torch.randn(2, 3, 4, 4)), [torch.randn(4, 3, 4, 4)]).train()


def steps(run: nn.Module, count: int = 2) -> None:
    for _ in range(count):
        run(torch.randn(4, 3, 4, 4)).square().sum().backward()


@pytest.mark.parametrize("static", [False, True], ids=["usual", "static_graph=True"])
def test_scales_that_get_no_gradient_any_more_are_named(static: bool):
    model = freeze_batch_norm(prepared())
    run = DistributedDataParallel(model, static_graph=static)
    steps(run)
    freeze_ranges(model)
    with pytest.raises(StageError, match=r"0\.weight_quantizer\.log2_scale, .* find_unused_parameters=True"):
        steps(run)
    run.eval()(torch.randn(4, 3, 4, 4))  # nobody waits
    if not static:  # which takes no first step by itself alone
        run = DistributedDataParallel(model.train())
        with run.no_sync():
            steps(run)


def test_so_is_that_of_a_batch_norm_without_a_layer_which_rounds_nothing_while_it_is_live():
    with pytest.raises(StageError, match=r"\(3\.weight_quantizer\.log2_scale\), and Distributed"):
        steps(DistributedDataParallel(prepared()))


@pytest.mark.parametrize("case", ["find_unused_parameters", "static_graph from then on", "left out", "no gradients"])
def test_what_ddp_knows_of_is_no_error(case: str):
    model = freeze_batch_norm(prepared())
    if case == "left out":
        names = [name for name, _ in model.named_parameters() if "quantizer" in name]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if case == "no gradients":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("quantizer" not in name)
    freeze_ranges(model)
    option = case.partition(" ")[0]
    steps(DistributedDataParallel(model, **{option: True} if "_" in option else {}), count=3)
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("what", ["ranges", "batch norm", "schedule"])
def test_messages_of_our_own_are_refused_inside_join(what: str, monkeypatch: pytest.MonkeyPatch):
    model = prepared(**{"activations": FOLLOWED} if what == "ranges" else {}, sync_batch_norm=what == "batch norm")
    if what == "batch norm":
        monkeypatch.setattr("hf_qat.quantization.synchronized_norm.is_active", lambda: True)
    else:
        freeze_batch_norm(model)
    run = DistributedDataParallel(model, find_unused_parameters=True)
    schedule = QATSchedule(model, total_steps=4) if what == "schedule" else None
    with pytest.raises(StageError, match="even_batches=True"), Join([run]):
        steps(run, count=1)
    assert schedule is None or schedule.phase == "batch norm frozen"


def test_learned_scales_alone_are_trained_inside_join():
    model = freeze_batch_norm(prepared())
    run = DistributedDataParallel(model)
    with Join([run]):
        steps(run)
    assert model[0].weight_quantizer.log2_scale.grad is not None
