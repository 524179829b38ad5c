"""Measure rows of the accuracy table, and print it.

    python -m tests.benchmarks.accuracy --nets MobileNetV2 --targets w4a4 --methods calibrated --seeds 0 1 2
    python -m tests.benchmarks.accuracy --show

Nets are trained in float from scratch (once: `--directory` keeps them), quantized, exported, and measured in torch and
on ONNX Runtime. A row that stands in `results/` is not measured again, so that a table can be filled in several
sittings; delete its file, or the row, to have it measured anew.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_qat.cli.demo.run import quiet
from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.rows import METHODS, TARGETS, TEST_IMAGES, TEST_SEED, Bench, measure
from tests.benchmarks.accuracy.table import RESULTS, add, key, plot, read, table
from tests.benchmarks.accuracy.textures import draw


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is not there yet, in the order of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument(
        "--methods", nargs="+", default=["calibrated", "QAT, 1 epoch", "QAT, 3 epochs"], choices=METHODS
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=Path("accuracy"), help="of trained nets; default: accuracy")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="write a plot to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.show:
        fill(options)
    print(table(read()))
    if options.plot:
        plot(read(), options.plot)


def fill(options: argparse.Namespace) -> None:
    """Measure the rows asked for that are not in the results, and write each as soon as it is known."""
    RESULTS.mkdir(exist_ok=True)
    bench = Bench(options.directory, draw(TEST_IMAGES, TEST_SEED))
    wanted = itertools.product(options.seeds, options.nets, options.targets, options.methods)
    for seed, net, target, method in wanted:
        if (net, target, method, seed) in {(*key(row), row.seed) for row in read()}:
            continue
        with quiet():
            row = measure(bench, net, target, method, seed)
        add(row)
        print(table([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
