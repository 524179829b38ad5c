"""The rows of peers as text, beside ours of the same nets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from statistics import mean

from tests.benchmarks.accuracy import rows as ours
from tests.benchmarks.accuracy.table import add_to, rows_in, spread
from tests.benchmarks.peers.rows import Question, Row


RESULTS = Path(__file__).parent / "results"

#: Our rows' methods → epochs of training.
METHODS = {"calibrated": 0.0, "QAT, 1 epoch": 1.0, "QAT, 3 epochs": 3.0}

#: Net, target, epochs.
Task = tuple[str, str, float]


def question(row: Row) -> Question:
    """What a row answers."""
    return Question(row.peer, row.net, row.target, row.epochs, row.rate, row.seed)


def read(directory: Path = RESULTS) -> list[Row]:
    """All rows measured so far."""
    return rows_in(directory, Row)


def add(row: Row, directory: Path = RESULTS) -> None:
    """Write a row to the file of its net, in place of one that was measured before."""
    add_to(directory / f"{row.net}.json", row, lambda one: astuple(question(one)))


def task(row: Row) -> Task:
    """What peers compete in."""
    return row.net, row.target, row.epochs


def best(rows: Iterable[Row]) -> dict[Task, dict[str, list[Row]]]:
    """Of each task and peer, the seeds at the learning rate that was best on average, among those of most seeds."""
    groups: dict[Task, dict[str, dict[float, list[Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        groups[task(row)][row.peer][row.rate].append(row)
    return {
        which: {peer: max(by_rate.values(), key=_merit) for peer, by_rate in peers.items()}
        for which, peers in sorted(groups.items())
    }


def _merit(seeds: Sequence[Row]) -> tuple[int, float]:
    reached = [row.reached for row in seeds if row.reached is not None]
    return len(reached), mean(row.reached - row.in_float for row in seeds if row.reached is not None) if reached else 0


HEAD = (
    f"{'':<12}{'':<8}{'epochs':>6}  {'':<14}{'rate':>9}{'seeds':>6}{'float':>8}{'calibr.':>8}{'int':>8}{'change':>8}"
    f"{'±':>6}{'off':>8}{'on':>8}  {'measured':<14}{'rounded':>9}{'BN':>4}"
)


def table(rows: Iterable[Row], own: Sequence[ours.Row]) -> str:
    """A line for each peer at its best rate, and for us: points against float; `off` and `on` are ONNX Runtime's
    optimizations, `rounded` the tensors of weights and activations, `BN` the batch norms left in the file.
    """
    lines = [HEAD]
    for (net, target, epochs), peers in best(rows).items():
        start = f"{net:<12}{target:<8}{epochs:>6g}  "
        lines += [start + _line(peer, seeds) for peer, seeds in peers.items()]
        mine = _ours((net, target, epochs), own)
        lines += [start + _own_line(mine)] if mine else []
    return "\n".join([*lines, *behind(rows, own)])


def _line(peer: str, seeds: Sequence[Row]) -> str:
    first, count = seeds[0], len(seeds)
    if all(row.reached is None for row in seeds):
        return f"{peer:<14}{first.rate:>9.3g}{count:>6}{first.in_float:>8.2f}  fails: {first.error}"
    there = [row for row in seeds if row.reached is not None]
    changes = [row.reached - row.in_float for row in there if row.reached is not None]
    measured = " / ".join(sorted({row.measured for row in seeds}))
    return (
        f"{peer:<14}{first.rate:>9.3g}{len(there):>6}{_mean(there, 'in_float')}{_mean(there, 'calibrated')}"
        f"{_mean(there, 'reached')}{mean(changes):>+8.2f}{spread(changes):>6.2f}{_mean(there, 'plain')}"
        f"{_mean(there, 'optimized')}  {measured:<14}{f'{first.weights}+{first.activations}':>9}{first.batch_norms:>4}"
    )


def _own_line(seeds: Sequence[ours.Row]) -> str:
    changes = [row.optimized - row.in_float for row in seeds]
    figures = [mean(figure) for figure in zip(*((r.in_float, r.optimized, r.plain) for r in seeds), strict=True)]
    return (
        f"{'hf_qat':<14}{'recipe':>9}{len(seeds):>6}{figures[0]:>8.2f}{'':>8}{figures[1]:>8.2f}{mean(changes):>+8.2f}"
        f"{spread(changes):>6.2f}{figures[2]:>8.2f}{figures[1]:>8.2f}  {'ONNX Runtime':<14}"
    )


def _mean(rows: Sequence[Row], name: str) -> str:
    figures = [getattr(row, name) for row in rows]
    there = [figure for figure in figures if figure is not None]
    return f"{mean(there):>8.2f}" if there else f"{'-':>8}"


def _ours(which: Task, own: Sequence[ours.Row]) -> list[ours.Row]:
    return [row for row in own if (row.net, row.target, METHODS.get(row.method)) == which]


def behind(rows: Iterable[Row], own: Sequence[ours.Row]) -> Iterator[str]:
    """Where a peer is ahead of us, on the seeds that both have of the same float nets."""
    for which, peers in best(rows).items():
        mine = {(row.seed, row.in_float): row.optimized for row in _ours(which, own)}
        for peer, seeds in peers.items():
            pairs = [(row.reached, mine.get((row.seed, row.in_float))) for row in seeds]
            gaps = [theirs - our for theirs, our in pairs if theirs is not None and our is not None]
            if gaps and mean(gaps) > 0:
                where = "{} {}, {:g} epochs".format(*which)
                yield f"behind {peer} by {mean(gaps):.2f} ± {spread(gaps):.2f}: {where}, {len(gaps)} seeds"
