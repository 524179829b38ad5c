"""Run a function in two processes that talk over gloo, and bring back what each returned."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


#: How long two processes may take, start included, in seconds.
LIMIT = 90


def _run(rank: int, function: Callable[[int], object], directory: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(function(rank), Path(directory) / f"{rank}.pt")
    dist.barrier()  # none closes its connections while the other still reads from them
    dist.destroy_process_group()


def on_two_ranks(function: Callable[[int], object], directory: Path) -> list[object]:
    """`[function(0), function(1)]`, each in a process of its own.

    Args:
        function: of a module, so that a new process finds it; returns tensors, numbers, strings, lists, dicts.
        directory: an empty one, where results are kept.
    """
    processes = mp.spawn(_run, args=(function, str(directory)), nprocs=2, join=False)
    if not processes.join(timeout=LIMIT) and not processes.join(timeout=30):
        for process in processes.processes:
            process.kill()
        pytest.fail("the two processes hang")
    return [torch.load(directory / f"{rank}.pt") for rank in (0, 1)]
