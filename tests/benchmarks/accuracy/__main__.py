"""Measure rows of the accuracy table, and print it.

    python -m tests.benchmarks.accuracy --nets MobileNetV2 --targets w4a4 --methods calibrated --seeds 0 1 2
    python -m tests.benchmarks.accuracy --workers 16 --seconds 480
    python -m tests.benchmarks.accuracy --show

Nets are trained in float from scratch (once: `--directory` keeps them), quantized, exported, and measured in torch and
on ONNX Runtime. A row that stands in the results is not measured again, so that a table can be filled in several
sittings; delete its file, or the row, to have it measured anew. What fails is printed, and the rest goes on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks.accuracy.jobs import Outcome, run
from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.plan import Wanted, plan
from tests.benchmarks.accuracy.rows import METHODS, TARGETS, Bench, Row
from tests.benchmarks.accuracy.table import RESULTS, add, key, plot, read, table


#: What is measured if nothing is said: the others are for comparisons on single rows.
USUAL_METHODS = ("calibrated", "calibrated, best", "QAT, 1 epoch", "QAT, 3 epochs")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--methods", nargs="*", default=list(USUAL_METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=Path("accuracy"), help="of trained nets; default: accuracy")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one CPU thread each; default: 1")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="write a plot to this file")
    options = parser.parse_args(argv)
    if not options.show:
        fill(options)
    print(table(read(options.results)))
    if options.plot:
        plot(read(options.results), options.plot)


def fill(options: argparse.Namespace) -> None:
    """Train the nets asked for and measure the rows that are not in the results; each is written when it is known."""
    there = {(*key(row), row.seed) for row in read(options.results)}
    asked = itertools.product(options.nets, options.targets, options.methods, options.seeds)
    wanted = [Wanted(*row) for row in asked if row not in there]
    floats = itertools.product(options.nets, options.seeds)
    jobs = plan(Bench(options.directory, options.device), wanted, () if options.methods else floats)
    for outcome in run(jobs, options.workers, options.seconds):
        if isinstance(outcome.result, Row):
            add(outcome.result, options.results)
        if report := _told(outcome):
            print(report, flush=True)


def _told(outcome: Outcome) -> str:
    """A line on a row, a float net, or what failed."""
    took = f"{outcome.seconds:6.1f} s"
    if outcome.error:
        return f"{took}  {'FAILED' if outcome.begun else 'left out'} {outcome.job.name}: {outcome.error.strip()}"
    if isinstance(outcome.result, Row):
        return f"{took}  {table([outcome.result]).splitlines()[-1]}"
    return f"{took}  {outcome.job.name}: {outcome.result:.2f} points" if outcome.result is not None else ""


if __name__ == "__main__":
    main()
