"""What there is to do for rows of the table, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.benchmarks.accuracy.jobs import Job
from tests.benchmarks.accuracy.nets import NETS
from tests.benchmarks.accuracy.rows import (
    METHODS,
    TARGETS,
    TEST_IMAGES,
    TEST_SEED,
    TRAIN_IMAGES,
    Bench,
    float_points,
    measure,
    recipe_for,
)
from tests.benchmarks.accuracy.textures import PART, draw_part


#: Steps of training that take about as long as reconstruction does.
STEPS_OF_BEST = 900


class Wanted(NamedTuple):
    """A row to be measured."""

    net: str
    target: str
    method: str
    seed: int


def plan(bench: Bench, wanted: Sequence[Wanted], floats: Iterable[tuple[str, int]] = ()) -> list[Job]:
    """Images, float nets, rows: of each those that take longest first, but teachers and hard targets before others.

    Args:
        bench: for which the jobs work.
        wanted: rows.
        floats: nets and seeds to train in any case.
    """
    pairs = {*floats, *((row.net, row.seed) for row in wanted)}
    trained = {(NETS[net].teacher or net, seed) for net, seed in pairs} | pairs
    seeds = {seed for _, seed in trained}
    images = [job for seed in sorted(seeds) for job in _images(bench, seed, TRAIN_IMAGES)]
    targets = list(TARGETS)
    return [
        *images,
        *_images(bench, TEST_SEED, TEST_IMAGES),
        *(_float(bench, net, seed) for net, seed in sorted(trained, key=_float_order)),
        *(
            Job(" ".join(map(str, row)), f"{row.net} {row.method}", measure, (bench, *row), (_float_name(*row[::3]),))
            for row in sorted(wanted, key=lambda row: (targets.index(row.target), -_steps(row), row.seed))
        ),
    ]


def _images(bench: Bench, seed: int, images: int) -> Iterator[Job]:
    """The parts of a seed's images."""
    for first in range(0, images, PART):
        arguments = (bench.directory, seed, first, min(PART, images - first))
        yield Job(f"images {seed} from {first}", "images", draw_part, arguments)


def _float(bench: Bench, net: str, seed: int) -> Job:
    """Training, after the images and the teacher."""
    drawn = [job.name for job in (*_images(bench, seed, TRAIN_IMAGES), *_images(bench, TEST_SEED, TEST_IMAGES))]
    teacher = NETS[net].teacher
    taught = [_float_name(teacher, seed)] if teacher else []
    return Job(_float_name(net, seed), f"float {net}", float_points, (bench, net, seed), (*drawn, *taught))


def _float_name(net: str, seed: int) -> str:
    return f"float {net} {seed}"


def _float_order(pair: tuple[str, int]) -> tuple[bool, float, str, int]:
    """Teachers first, then by steps."""
    net, seed = pair
    teachers = {each.teacher for each in NETS.values()}
    return net not in teachers, -NETS[net].epochs / NETS[net].batch, net, seed


def _steps(row: Wanted) -> float:
    """What it costs, in steps of training."""
    how = METHODS[row.method]
    effort = how.effort or recipe_for(NETS[row.net].kind, row.target).config.get("calibration_effort")
    return how.epochs * TRAIN_IMAGES / NETS[row.net].batch + (STEPS_OF_BEST if effort == "best" else 0)
