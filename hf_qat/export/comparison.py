"""How far outputs are apart, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_qat.errors import ExportError
from hf_qat.export.report import Agreement


#: Where classes lie, by the number of axes: (N, C), (N, queries, C), (N, C, H, W).
CLASS_AXES = {2: 1, 3: 2, 4: 1}

#: Differences of outputs up to so many steps are none: a step, and what float32 makes of it.
WITHIN_STEP = 1.01

#: Names of outputs that hold a score for each class.
SCORES = frozenset({"logits", "output"})


#: Outputs of a detector that say of each query what it has found, and where.
QUERIES = ("logits", "pred_boxes")


@dataclass
class Comparison:
    """Differences, collected batch by batch; `steps` are the quantization steps of the outputs."""

    steps: list[float | None]
    agreeing: int = 0
    predictions: int = 0
    lsb: float | None = None
    difference: float = 0.0
    errors: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.errors, self.energies = [0.0] * len(self.steps), [0.0] * len(self.steps)

    def add(self, expected: Sequence[tuple[str, np.ndarray]], results: Sequence[np.ndarray]) -> None:
        """One batch: the named outputs of torch, and those that are compared with them.

        Raises:
            ExportError: an output has another shape, as the number of key points may, which their scores decide.
        """
        for (name, wanted), got in zip(expected, results, strict=True):
            if wanted.shape != got.shape:
                raise ExportError(
                    f"the output {name!r} has the shape {wanted.shape} in torch and {got.shape} where it is compared: "
                    "how much there is of it depends on values, which differ by rounding. export_onnx(..., "
                    "verify=False) writes the file; compare what comes before it is chosen."
                )
        results = _in_order_of_queries(expected, results)
        for k, ((name, wanted), got, step) in enumerate(zip(expected, results, self.steps, strict=True)):
            differences = _differences(wanted, got)
            largest = float(differences.max(initial=0.0))
            self.difference = max(self.difference, largest)
            if step is not None:
                self.lsb = max(self.lsb or 0.0, largest / step)
            counted = differences[differences > (step or 0.0) * WITHIN_STEP]
            self.errors[k] += float(np.square(counted).sum())
            self.energies[k] += float(np.square(wanted[np.isfinite(wanted)].astype(np.float64)).sum())
            self._compare_classes(name, wanted, got)

    def _compare_classes(self, name: str, wanted: np.ndarray, got: np.ndarray) -> None:
        axis = CLASS_AXES.get(wanted.ndim) if name in SCORES else None
        if axis is None or wanted.shape[axis] <= 1:
            return
        known = ~np.isnan(wanted).any(axis) & ~np.isnan(got).any(axis)
        same = (wanted.argmax(axis) == got.argmax(axis)) & known
        self.agreeing += int(same.sum())
        self.predictions += same.size

    def result(self) -> Agreement:
        """What all batches came to."""
        share = self.agreeing / self.predictions if self.predictions else None
        relative = max(map(_relative, self.errors, self.energies), default=0.0)
        lsb = None if self.lsb is None or math.isinf(self.lsb) else round(self.lsb)
        return Agreement(share, lsb, self.difference, relative)


def _in_order_of_queries(
    expected: Sequence[tuple[str, np.ndarray]], results: Sequence[np.ndarray]
) -> Sequence[np.ndarray]:
    """The results of a detector with each query at the place of the one in `expected` that is nearest to it.

    Queries that are chosen by their scores are a set: where two scores are nearly equal, they may change places.
    """
    named = {name: (wanted, got) for (name, wanted), got in zip(expected, results, strict=True)}
    if not all(name in named and named[name][0].ndim == 3 for name in QUERIES):
        return results
    images = range(len(named[QUERIES[0]][0]))
    orders = [_nearest([(wanted[k], got[k]) for wanted, got in map(named.__getitem__, QUERIES)]) for k in images]
    return [_rearranged(got, orders) for got in results]


def _rearranged(values: np.ndarray, orders: Sequence[np.ndarray]) -> np.ndarray:
    """One order for each image on the axis of the queries, which layers may stand before; what has none stays."""
    axis = next((axis for axis in (1, 2) if values.ndim > axis and values.shape[axis] == len(orders[0])), None)
    if axis is None or len(values) != len(orders):
        return values
    return np.stack([np.take(of_image, order, axis - 1) for of_image, order in zip(values, orders, strict=True)])


def _nearest(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """For each query of the first of a pair one of the second, the nearest first; all outputs count alike."""
    distances = np.zeros((len(pairs[0][0]),) * 2)
    for wanted, got in pairs:
        apart = np.stack([np.abs(query.astype(np.float64) - got).mean(-1) for query in wanted])
        distances += np.nan_to_num(apart / max(float(np.abs(wanted).max(initial=0.0)), 1e-12), nan=np.inf)
    order = np.arange(len(distances))
    if not np.isfinite(distances).all():
        return order
    for _ in distances:
        row, column = np.unravel_index(distances.argmin(), distances.shape)
        order[row] = column
        distances[row], distances[:, column] = np.inf, np.inf
    return order


def _differences(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Magnitudes; 0 between infinities of one sign, infinite where there is NaN."""
    with np.errstate(invalid="ignore"):
        differences = np.asarray(np.abs(wanted.astype(np.float64) - got))
    differences[wanted == got] = 0.0
    return np.where(np.isnan(differences), np.inf, differences)


def _relative(error: float, energy: float) -> float:
    if error == 0.0:
        return 0.0
    return math.sqrt(error / energy) if energy else math.inf
