from __future__ import annotations

from pathlib import Path

import torch

from hf_qat.quantization import collectives
from tests.ranks import on_two_ranks


def every_reduction(rank: int) -> dict[str, object]:
    """Of numbers that differ between the two ranks."""
    mine = torch.tensor([[1.5, -2.0], [4.0, 8.0]][rank])
    kept = mine.clone()
    counts = torch.tensor([2**40 + rank, 7])
    return {
        "active": collectives.is_active(),
        "range": [x.tolist() for x in collectives.synchronized_range(mine, mine + 1)],
        "lists": collectives.range_over_ranks([mine[0].item()], [mine[1].item()]),
        "mean": collectives.mean_over_ranks(mine).tolist(),
        "max": collectives.max_over_ranks([-5, -9][rank]),
        "min": collectives.min_over_ranks([3, 11][rank]),
        "sum": collectives.sum_over_ranks(counts).tolist(),
        "untouched": torch.equal(mine, kept) and counts.tolist() == [2**40 + rank, 7],
    }


def test_two_ranks_agree_on_what_was_worked_out_by_hand(tmp_path: Path):
    expected = {
        "active": True,
        "range": [[1.5, -2.0], [5.0, 9.0]],
        "lists": ([1.5], [8.0]),
        "mean": [2.75, 3.0],
        "max": -5,
        "min": 3,
        "sum": [2**41 + 1, 14],
        "untouched": True,
    }
    assert on_two_ranks(every_reduction, tmp_path) == [expected, expected]


def test_one_process_alone_keeps_what_it_has():
    low, high = torch.tensor([1.0, -3.0]), torch.tensor([5.0, -2.0])
    assert not collectives.is_active()
    assert collectives.synchronized_range(low, high) == (low, high)
    assert collectives.mean_over_ranks(low) is low
    assert collectives.min_over_ranks(4) == 4
