"""Two processes with a part of the batch each, against PyTorch's batch norm of the whole batch, in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, fake_quant_disabled, prepare_qat
from hf_qat.quantization.synchronized_norm import SynchronizedBatchNorm, synchronize_batch_norms
from tests.models import spread
from tests.ranks import on_two_ranks


NORMS = {
    "usual": {},
    "average of all batches": {"momentum": None},
    "without parameters": {"affine": False},
    "without statistics": {"track_running_stats": False},
}

#: What users set on a norm that is there.
CHANGED = {
    "that counts no batches": {"num_batches_tracked": None},
    "that counts no batches and averages them": {"num_batches_tracked": None, "momentum": None},
    "whose statistics stay": {"track_running_stats": False},
}

#: How many of the ten images the first process has.
SHARE = 3


def norm_of(name: str) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4, **NORMS.get(name, {}))
    for attribute, value in CHANGED.get(name, {}).items():
        setattr(norm, attribute, value)
    for position, parameter in enumerate(norm.parameters()):
        nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(position))
    return norm


def data(seed: int) -> Tensor:
    """(10, 4, 5, 6) float32."""
    return torch.randn(10, 4, 5, 6, generator=torch.Generator().manual_seed(seed))


def run(norm: nn.BatchNorm2d, part: slice) -> dict[str, Tensor]:
    """Two training steps, on a part of the images each; the last one's output and gradients, and all buffers."""
    dtype = next((tensor.dtype for tensor in norm.state_dict().values()), torch.float32)
    for seed in (0, 1):
        norm.zero_grad()
        x = (30 + data(seed)[part]).to(dtype).requires_grad_()  # far from 0, where sums of squares lose digits
        out = norm(x)
        (out * data(7)[part]).sum().backward()
    found = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in norm.named_parameters()}}
    return {name: tensor.float() for name, tensor in {**found, **dict(norm.named_buffers())}.items()}


class WithAuxiliary(nn.Module):
    """A norm without statistics, and one that only training calls: both stay operations of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.auxiliary, self.auxiliary_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) → the same shape."""
        out = torch.relu(self.norm(self.conv(x)))
        return out + self.auxiliary_norm(self.auxiliary(out)) if self.training else out


def with_auxiliary() -> nn.Module:
    return spread(WithAuxiliary())


def run_model(model: nn.Module, part: slice) -> dict[str, Tensor]:
    """The output of a step of training, on a part of the images, and all buffers of norms."""
    dtype = next(model.parameters()).dtype
    out = model.train()(data(0)[part].to(dtype))
    found = {name: value for name, value in model.named_buffers() if "auxiliary_norm" in name}
    return {"out": out.detach().float(), **{name: value.float() for name, value in found.items()}}


def in_parts(rank: int) -> dict[str, dict[str, Tensor]]:
    results, part = {}, slice(None, SHARE) if rank == 0 else slice(SHARE, None)
    for name in (*NORMS, *CHANGED):
        norm = norm_of(name)
        synchronize_batch_norms(norm)
        results[name] = run(norm, part)
    model = prepare_qat(with_auxiliary(), QATConfig(sync_batch_norm=True), data(0)[:2])
    with fake_quant_disabled(model):
        results["model"] = run_model(copy.deepcopy(model), part)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list:
    return on_two_ranks(in_parts, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [*NORMS, *CHANGED])
def test_two_processes_compute_what_batch_norm_does_on_the_whole_batch(name: str, ranks: list):
    expected = run(norm_of(name).double(), slice(None))
    first, second = (result[name] for result in ranks)
    for key in ("out", "x"):
        torch.testing.assert_close(torch.cat([first[key], second[key]]), expected[key], rtol=1e-4, atol=1e-4)
    for key in expected.keys() - {"out", "x"}:
        summed = first[key] + second[key] if key in ("weight", "bias") else first[key]  # DDP adds gradients up
        torch.testing.assert_close(summed, expected[key], rtol=1e-4, atol=1e-4)
        if key not in ("weight", "bias"):
            assert torch.equal(first[key], second[key])


def test_norms_that_stay_operations_of_a_graph_are_those_of_the_whole_batch_too(ranks: list):
    expected = run_model(with_auxiliary().double(), slice(None))
    first, second = (result["model"] for result in ranks)
    found = {"out": torch.cat([first.pop("out"), second.pop("out")]), **first}
    assert found.keys() == expected.keys() and len(found) == 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_in_evaluation_one_process_alone_computes_what_it_did(tmp_path: Path):
    norm = norm_of("usual").eval()
    expected = norm(data(0))
    synchronize_batch_norms(norm)
    assert torch.equal(norm(data(0)), expected)


def test_only_batch_norms_are_exchanged_and_only_once():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.GroupNorm(1, 1), nn.SyncBatchNorm(1))
    synchronize_batch_norms(model)
    types = [type(module) for module in model]
    assert [isinstance(module, SynchronizedBatchNorm) for module in model] == [False, True, False, False]
    synchronize_batch_norms(model)
    assert [type(module) for module in model] == types
