"""Peak memory of a piece of work as PyTorch's allocator sees it: the same in every run, unlike the size of a process.

What libraries below PyTorch (oneDNN, BLAS) keep for themselves is not in it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], None]) -> int:
    """Highest number of bytes allocated on the CPU at one time while `work` runs, beyond those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
