"""Run many calls in processes of their own, some after others; one that fails takes nothing else with it."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch


#: Seconds that the operating system can be told to wait.
LONGEST_WAIT = 3600.0


@dataclass(frozen=True)
class Job:
    """A call.

    Attributes:
        name: as it is printed; no two jobs share one.
        kind: jobs of a kind take about as long as each other.
        call: a function that another process can import.
        needs: names of jobs that have to have succeeded before.
    """

    name: str
    kind: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        result: what the call returned.
        error: why it did not, or why it was not begun; empty if it went well.
        seconds: it took.
        begun: whether it was.
    """

    job: Job
    result: Any = None
    error: str = ""
    seconds: float = 0.0
    begun: bool = True


class Worker:
    """A process that does one job after another, until one fails: a broken GPU context would fail all after it."""

    def __init__(self) -> None:
        spawning = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = spawning.Pipe()
        self.process: BaseProcess = spawning.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.began = 0.0
        self.ended = False

    def begin(self, job: Job) -> None:
        """Hand over a job; its outcome comes through `connection`."""
        self.job, self.began = job, time.monotonic()
        with suppress(OSError):  # it died meanwhile, which its outcome will tell
            self.connection.send((job.call, job.arguments))

    def outcome(self) -> Outcome:
        """Of the job that has ended, one way or the other."""
        assert self.job is not None
        job, self.job = self.job, None
        try:
            result, error, seconds = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            result, error = None, f"its process ended with code {self.process.exitcode}"
            seconds = time.monotonic() - self.began
        self.ended = bool(error)
        return Outcome(job, result, error, seconds)

    def leave(self) -> None:
        """Let the process end, at once if it is at work."""
        self.connection.close()
        if self.job is not None:
            self.process.kill()


def serve(connection: Connection) -> None:
    """What a worker does: calls until one fails, or nobody asks any more."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # what is measured is integers; convolutions are not to round to 10 bits
    error = ""
    while not error:
        try:
            call, arguments = connection.recv()
        except EOFError:
            return
        began = time.monotonic()
        try:
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                result = call(*arguments)
        except Exception:
            result, error = None, traceback.format_exc()
        connection.send((result, error, time.monotonic() - began))


def run(jobs: Sequence[Job], workers: int, seconds: float) -> Iterator[Outcome]:
    """The outcome of each job as soon as it is known.

    Args:
        jobs: those that come first begin first, as soon as what they need has succeeded.
        workers: processes.
        seconds: no job begins that would end later, if it takes as long as the longest of its kind so far; what runs
            then is ended.
    """
    end, waiting = time.monotonic() + seconds, list(jobs)
    done: set[str] = set()
    lost: set[str] = set()
    longest: dict[str, float] = {}
    team = [Worker() for _ in range(min(workers, len(jobs)))]
    try:
        while waiting or any(worker.job for worker in team):
            for outcome in _not_to_be(waiting, lost, end, longest):
                lost.add(outcome.job.name)
                waiting.remove(outcome.job)
                yield outcome
            _begin(waiting, done, team)
            for outcome in _ended(team, end):
                (lost if outcome.error else done).add(outcome.job.name)
                longest[outcome.job.kind] = max(longest.get(outcome.job.kind, 0.0), outcome.seconds)
                yield outcome
    finally:
        for worker in team:
            worker.leave()


def _not_to_be(waiting: Sequence[Job], lost: set[str], end: float, longest: dict[str, float]) -> Iterator[Outcome]:
    """Of the jobs that are not to begin any more."""
    left = end - time.monotonic()
    for job in list(waiting):
        missing, takes = [name for name in job.needs if name in lost], longest.get(job.kind, 0.0)
        if missing:
            yield Outcome(job, error=f"it needs {', '.join(missing)}", begun=False)
        elif takes > left:
            yield Outcome(job, error=f"it takes {takes:.0f} s, and {max(left, 0):.0f} are left", begun=False)


def _begin(waiting: list[Job], done: set[str], team: list[Worker]) -> None:
    """Give those who have nothing to do the first jobs that can begin."""
    for place, worker in enumerate(team):
        ready = next((job for job in waiting if done.issuperset(job.needs)), None)
        if worker.job is None and ready is not None:
            waiting.remove(ready)
            if worker.ended:
                team[place] = Worker()
            team[place].begin(ready)


def _ended(team: Sequence[Worker], end: float) -> Iterator[Outcome]:
    """Wait until at least one job has ended; at the end of the time all have."""
    busy = {worker.connection: worker for worker in team if worker.job is not None}
    ready = wait(list(busy), min(max(0.0, end - time.monotonic()), LONGEST_WAIT)) if busy else []
    if not ready and time.monotonic() >= end:
        for worker in busy.values():
            worker.process.kill()
            yield replace(worker.outcome(), error="the time is over")
    for connection in ready:
        yield busy[connection].outcome()
