"""Measure peers on the accuracy benchmark's nets, and print them beside our own rows.

    python -m tests.benchmarks.peers --nets MobileNetV2 --targets w4a4 --peers Brevitas --seeds 0 --directory accuracy
    python -m tests.benchmarks.peers --workers 16 --seconds 480 --directory accuracy
    python -m tests.benchmarks.peers --show

In an environment that has the peers (README.md of this directory); one that is not installed has no rows. The float
nets, images, batches, schedule and number of steps are those of `python -m tests.benchmarks.accuracy`, whose
`--directory` may be the same. Rates are those of our recipe times `--factors`, and what a peer's documents advise; the
table tells the best. A row that stands in the results is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.benchmarks.accuracy import table as accuracy
from tests.benchmarks.accuracy.jobs import Job, run
from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.plan import plan
from tests.benchmarks.accuracy.rows import Bench, float_points
from tests.benchmarks.peers.peer import TARGETS
from tests.benchmarks.peers.registry import PEERS
from tests.benchmarks.peers.rows import Question, Row, measure, rates
from tests.benchmarks.peers.table import RESULTS, add, question, read, table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--nets", nargs="+", default=["MobileNetV2", "ResNet"], choices=list(NETS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", nargs="+", type=float, default=[3.0])
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0, 0.5, 2.0], help="times our recipe's rate")
    parser.add_argument("--directory", type=Path, default=Path("accuracy"), help="of trained nets; default: accuracy")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the rows")
    parser.add_argument("--ours", type=Path, default=accuracy.RESULTS, help="directory of our own rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one CPU thread each; default: 1")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that would end later")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    if not options.show:
        fill(options)
    print(table(read(options.results), accuracy.read(options.ours)))


def fill(options: argparse.Namespace) -> None:
    """Measure the rows asked for that are not in the results; each is written when it is known."""
    there = {question(row) for row in read(options.results)}
    bench = Bench(options.directory, options.device)
    floats = plan(bench, (), itertools.product(options.nets, options.seeds))
    trained = {job.arguments[1:]: job.name for job in floats if job.call is float_points}
    asked = [
        Job(str(each), f"{each.net} {each.peer}", measure, (bench, each), (trained[each.net, each.seed],))
        for each in questions(options)
        if each not in there
    ]
    for outcome in run([*floats, *asked], options.workers, options.seconds):
        if isinstance(outcome.result, Row):
            add(outcome.result, options.results)
            print(f"{outcome.seconds:6.1f} s  {table([outcome.result], ()).splitlines()[-1]}", flush=True)
        elif outcome.error:
            print(f"{outcome.seconds:6.1f} s  FAILED {outcome.job.name}: {outcome.error.strip()}", flush=True)


def questions(options: argparse.Namespace) -> Iterator[Question]:
    """All rates of one kind before those of the next, so that a run that is cut off has a row for everybody."""
    installed = [PEERS[name] for name in options.peers if importlib.util.find_spec(PEERS[name].module)]
    most = len(options.factors) + max((len(peer.advised_rates) for peer in installed), default=0)
    wanted = itertools.product(range(most), options.seeds, options.targets, options.nets, installed, options.epochs)
    for place, seed, target, net, peer, epochs in wanted:
        tried = rates(peer, net, target, options.factors)
        if target in peer.targets and place < len(tried):
            yield Question(peer.name, net, target, epochs, tried[place], seed)


if __name__ == "__main__":
    main()
