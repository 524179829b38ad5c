"""How far outputs are apart: figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hf_qat.export.comparison import Comparison


def relative_error(wanted: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> float:
    comparison = Comparison([None] * len(wanted))
    comparison.add(list(wanted.items()), [got[name] for name in wanted])
    return comparison.result().relative_error


@pytest.fixture
def detections() -> dict[str, np.ndarray]:
    """Of two images, five queries each, whose hidden states are told by the order of their queries."""
    generator = np.random.default_rng(0)
    shapes = {"logits": (2, 5, 3), "pred_boxes": (2, 5, 4), "hidden": (2, 5, 8), "layers": (2, 1, 5, 2), "map": (2, 7)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def in_another_order(detections: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Another one for each image."""
    orders = (np.array([4, 0, 1, 3, 2]), np.array([1, 2, 3, 4, 0]))
    changed = {name: values.copy() for name, values in detections.items()}
    for image, order in enumerate(orders):
        for name in ("logits", "pred_boxes", "hidden"):
            changed[name][image] = detections[name][image][order]
        changed["layers"][image] = detections["layers"][image][:, order]
    return changed


def test_the_queries_of_a_detector_are_a_set(detections):
    assert relative_error(detections, in_another_order(detections)) == 0


def test_a_query_that_differs_is_a_difference_whatever_the_order(detections):
    changed = in_another_order(detections)
    changed["pred_boxes"][1, 2, 0] += 0.5
    energy = np.linalg.norm(detections["pred_boxes"].astype(np.float64))
    assert relative_error(detections, changed) == pytest.approx(0.5 / energy, rel=1e-5)


def test_a_query_that_is_missing_is_a_difference(detections):
    changed = in_another_order(detections)
    for name in ("logits", "pred_boxes", "hidden"):
        changed[name][0, 0] = changed[name][0, 1]  # found twice
    assert relative_error(detections, changed) > 0.3


def test_no_order_hides_what_is_no_number(detections):
    changed = in_another_order(detections)
    changed["logits"][0, 3] = np.nan
    assert relative_error(detections, changed) == np.inf


def test_other_outputs_are_compared_place_by_place():
    rows = {"logits": np.eye(3, dtype=np.float32)[None]}
    assert relative_error(rows, {"logits": rows["logits"][:, ::-1]}) == pytest.approx((4 / 3) ** 0.5)
