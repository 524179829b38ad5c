"""Observers against numpy: exact histograms, quantiles, a brute-force search in float64, and two real processes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qat.errors import CalibrationError, ConfigError
from hf_qat.quantization.observers import (
    OBSERVERS,
    Observer,
    make_observer,
    moving_average,
    register_observer,
    synchronized_range,
)
from hf_qat.quantization.observers.histogram import Histogram
from hf_qat.quantization.observers.mse import squared_errors
from hf_qat.quantization.observers.percentile import quantile
from hf_qat.quantization.spec import QuantizerSpec
from tests.ranks import on_two_ranks


NAMES = ["minmax", "moving_average", "percentile", "mse"]


def affine(observer: str, bits: int = 8) -> QuantizerSpec:
    return QuantizerSpec(bits=bits, signed=False, symmetric=False, observer=observer)


def observe(spec: QuantizerSpec, *batches: torch.Tensor) -> Observer:
    observer = make_observer(spec)
    for batch in batches:
        observer.observe(batch)
    return observer


def histogram_of(*batches: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch.reshape(-1), float(batch.min()), float(batch.max()))
    return histogram


# --- Registry and bad input ------------------------------------------------------------------------------------------


def test_every_promised_observer_is_registered():
    assert sorted(OBSERVERS) == sorted(NAMES)


def test_an_unknown_observer_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown observer 'mim_max'. Did you mean 'minmax'\?.*'percentile'"):
        make_observer(QuantizerSpec(observer="mim_max"))


def test_a_registered_observer_can_be_made_by_its_name_and_a_name_is_given_once(monkeypatch):
    monkeypatch.delitem(OBSERVERS, "minmax")
    taken = register_observer("minmax")(OBSERVERS["mse"])
    assert type(make_observer(QuantizerSpec(observer="minmax"))) is taken
    with pytest.raises(ConfigError, match="'minmax' exists already"):
        register_observer("minmax")(taken)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_an_error_and_leave_no_trace(name, bad):
    observer = observe(affine(name), torch.tensor([-1.0, 2.0]))
    before = observer.qparams()
    with pytest.raises(CalibrationError, match=r"shape \(1, 3\).*NaN or Inf"):
        observer.observe(torch.tensor([[0.0, bad, 9.0]]))
    assert observer.qparams() == before


def test_integers_are_an_error():
    with pytest.raises(CalibrationError, match=r"torch.uint8 has no range"):
        make_observer(affine("mse")).observe(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_a_range_without_data_is_an_error_and_empty_batches_are_no_data(name):
    with pytest.raises(CalibrationError, match="no values were observed"):
        observe(affine(name), torch.empty(0, 4)).qparams()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_constants_give_sane_scales(name):
    scale, zero_point = observe(affine(name), torch.zeros(2, 3), torch.zeros(2, 3)).qparams()
    assert (float(scale), float(zero_point)) == (pytest.approx(1 / 255), 0)
    scale, zero_point = observe(affine(name), torch.full((9,), 3.0)).qparams()
    assert (float(scale) * 255, float(zero_point)) == (pytest.approx(3, rel=0.01), 0)


@pytest.mark.parametrize("name", NAMES)
def test_type_and_memory_format_make_no_difference(name):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    expected = observe(affine(name), x.float()).qparams()
    for same in (x, x.double(), x.float().to(memory_format=torch.channels_last), x[:, :, ::1].transpose(1, 3)):
        assert observe(affine(name), same).qparams() == expected
    assert not expected[0].requires_grad
    assert observe(affine(name), torch.tensor(2.0)).qparams()[0] == pytest.approx(2 / 255, rel=0.01)


def test_float64_is_observed_as_the_float32_it_becomes():
    scale, _ = observe(affine("mse"), torch.tensor([0.0, 2048 - 1e-9], dtype=torch.float64)).qparams()
    assert float(scale) * 255 == pytest.approx(2048, rel=0.01)


# --- Extremes --------------------------------------------------------------------------------------------------------


def test_minmax_spans_all_batches():
    scale, zero_point = observe(affine("minmax"), torch.tensor([-1.0, 0.5]), torch.tensor([[0.0], [3.0]])).qparams()
    assert (float(scale), float(zero_point)) == (pytest.approx(4 / 255), 64)


def test_a_moving_average_weighs_the_new_value_by_the_momentum():
    moved = moving_average(torch.tensor([1.0, -2.0]), torch.tensor([2.0, -4.0]), 0.25)
    torch.testing.assert_close(moved, torch.tensor([1.25, -2.5]))


def test_the_moving_average_of_few_batches_is_the_mean_of_their_extremes():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-2.0, 6.0]), torch.tensor([-3.0, 4.0])]
    scale, zero_point = observe(affine("moving_average"), *batches).qparams()
    assert (float(scale), float(zero_point)) == (pytest.approx((4.0 + 2.0) / 255), 85)


def test_after_a_hundred_batches_a_new_one_weighs_one_percent():
    highs = np.random.default_rng(0).uniform(1, 2, 250)
    expected = highs[:100].mean()
    for high in highs[100:]:
        expected += 0.01 * (high - expected)
    scale, _ = observe(affine("moving_average"), *torch.from_numpy(highs).float().unsqueeze(1)).qparams()
    assert float(scale) * 255 == pytest.approx(expected, rel=1e-5)


# --- Histogram -------------------------------------------------------------------------------------------------------

magnitudes = st.sampled_from([1e-30, 1e-7, 1e-3, 0.37, 1.0, 100.0, 3e4])
arrays = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 400), magnitudes, st.sampled_from([-3.0, -1.0, 0.0, 5.0]))


def draw(seed: int, size: int, magnitude: float, shift: float) -> np.ndarray:
    return ((np.random.default_rng(seed).standard_normal(size) + shift) * magnitude).astype(np.float32)


@given(st.lists(arrays, min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_counts_are_those_of_numpy_on_the_final_edges_in_whatever_order_batches_come(drawn):
    batches = [draw(*parameters) for parameters in drawn]
    histogram = histogram_of(*map(torch.from_numpy, batches))
    values = np.concatenate(batches)
    expected, _ = np.histogram(values.astype(np.float64), bins=histogram.edges.numpy())
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)
    assert expected.sum() == values.size
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
    backwards = histogram_of(*map(torch.from_numpy, reversed(batches)))
    at_once = histogram_of(torch.from_numpy(values))
    for other in (backwards, at_once):
        assert (other.exponent, other.start) == (histogram.exponent, histogram.start)
        assert torch.equal(other.counts, histogram.counts)


def test_bins_are_as_narrow_as_the_data_allow():
    histogram = histogram_of(torch.tensor([-1.0, 0.0, 1.0]))
    assert histogram.width == 2**-9  # 1025 bins hold [-1, 1]; of half the width 2049 would be needed
    assert histogram_of(torch.tensor([0.0, 2047.5])).width == 1.0
    assert histogram_of(torch.tensor([0.0, 2048.0])).width == 2.0


def test_values_on_an_edge_and_just_below_it_are_told_apart():
    below, tiny = math.nextafter(-1.0, -2.0), 1e-42
    x = torch.tensor([-1.0, below, -tiny, tiny, 0.0, -0.0, 4.0], dtype=torch.float32)
    histogram = histogram_of(x)
    zero = -histogram.start
    assert histogram.counts[zero].item() == 3
    assert histogram.counts[zero - 1].item() == 1
    one = zero - round(1 / histogram.width)
    assert histogram.counts[one].item() + histogram.counts[one - 1].item() == 2


def test_zeros_first_do_not_fix_the_range():
    histogram = histogram_of(torch.zeros(1000), torch.linspace(-8, 8, 101))
    assert int(histogram.counts.sum()) == 1101
    assert int(histogram.counts[-histogram.start]) >= 1001


def test_counts_beyond_the_integers_of_float32_are_exact():
    histogram = histogram_of(torch.zeros(2**24 + 3))
    histogram.add(torch.tensor([0.0, 0.0]), 0.0, 0.0)
    assert int(histogram.counts[0]) == 2**24 + 5


# --- Percentile ------------------------------------------------------------------------------------------------------


@given(st.lists(arrays, min_size=1, max_size=3), st.sampled_from([0.0001, 0.01, 0.3, 0.5, 0.99, 0.9999]))
@settings(deadline=None, max_examples=100)
def test_a_quantile_is_that_of_numpy_to_within_a_bin(drawn, share):
    values = np.concatenate([draw(*parameters) for parameters in drawn])
    histogram = histogram_of(torch.from_numpy(values))
    found = quantile(histogram, share)
    # The quantile of n values is only defined to within the two neighbours of rank share * n.
    lower, upper = (np.quantile(values.astype(np.float64), share, method=m) for m in ("inverted_cdf", "higher"))
    assert min(lower, upper) - histogram.width <= found <= max(lower, upper) + histogram.width
    assert values.min() <= found <= values.max()


def test_the_percentile_observer_leaves_out_a_ten_thousandth_on_either_side():
    x = torch.linspace(-10, 30, 400_001)[torch.randperm(400_001, generator=torch.Generator().manual_seed(0))]
    x[:20], x[20:30] = 1000.0, -500.0
    scale, zero_point = observe(affine("percentile"), *x.split(100_000)).qparams()
    assert float(scale) * 255 == pytest.approx(40, abs=1.0)  # bins are 1 wide
    assert float(zero_point) == pytest.approx(64, abs=5)


# --- Least squared error ---------------------------------------------------------------------------------------------


def squared_error(x: np.ndarray, scale: float, zero_point: float, spec: QuantizerSpec) -> float:
    codes = np.clip(np.rint(x / scale) + zero_point, spec.qmin, spec.qmax)
    return float((((codes - zero_point) * scale - x) ** 2).sum())


def best_squared_error(x: np.ndarray, spec: QuantizerSpec) -> float:
    """Of all pairs of bounds on a fine grid, in float64 and on the values themselves."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    fractions = np.geomspace(1 / 40, 1, 60)
    if spec.power_of_two:
        zero_points = [0] if spec.symmetric else range(spec.qmin, spec.qmax + 1)
        return min(squared_error(x, 2.0**e, z, spec) for e in range(-12, 6) for z in zero_points)
    if spec.symmetric:
        scale = max(high / spec.qmax, low / spec.qmin if spec.qmin else 0.0)
        return min(squared_error(x, scale * f, 0, spec) for f in np.geomspace(1 / 40, 1, 500))
    best = math.inf
    for upper in fractions * high:
        for lower in fractions * low if low < 0 else [0.0]:
            scale = (upper - lower) / (spec.qmax - spec.qmin)
            best = min(best, squared_error(x, scale, np.rint(spec.qmin - lower / scale), spec))
    return best


DATA = {
    "normal": lambda rng: rng.standard_normal(3000),
    "half zeros": lambda rng: np.maximum(rng.standard_normal(3000), 0),
    "heavy tails": lambda rng: rng.standard_t(3, 3000),
    "one long tail": lambda rng: rng.exponential(1.0, 3000) ** 2 - 0.3,
    "silu": lambda rng: (lambda v: v / (1 + np.exp(-v)))(3 * rng.standard_normal(3000)),
}
SPECS = {
    "affine": {"signed": False, "symmetric": False},
    "symmetric": {},
    "unsigned": {"signed": False},
    "power of two": {"power_of_two": True},
    "affine power of two": {"signed": False, "symmetric": False, "power_of_two": True},
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_mse_range_is_close_to_the_best_of_a_brute_force_search(kind, data, bits):
    x = DATA[data](np.random.default_rng(bits)).astype(np.float32)
    x = np.abs(x) if kind == "unsigned" else x
    spec = QuantizerSpec(bits=bits, observer="mse", **SPECS[kind])
    scale, zero_point = observe(spec, torch.from_numpy(x)).qparams()
    found = squared_error(x.astype(np.float64), float(scale), float(zero_point), spec)
    assert found <= best_squared_error(x.astype(np.float64), spec) * 1.03


def test_the_mse_range_of_sixteen_bits_hardly_clips():
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    spec = QuantizerSpec(bits=16, observer="mse")
    scale, _ = observe(spec, torch.from_numpy(x)).qparams()
    minmax, _ = observe(QuantizerSpec(bits=16, observer="minmax"), torch.from_numpy(x)).qparams()
    x = x.astype(np.float64)
    assert squared_error(x, float(scale), 0, spec) <= squared_error(x, float(minmax), 0, spec) * 1.001


@pytest.mark.parametrize("kind", ["affine", "symmetric", "unsigned"])
@pytest.mark.parametrize("step_in_bins", [0.11, 1.0, 7.3])
def test_the_expected_error_is_that_of_values_spread_evenly_over_their_bins(kind, step_in_bins):
    rng = np.random.default_rng(0)
    histogram = histogram_of(torch.from_numpy(rng.uniform(-3, 5, 50).astype(np.float32)))
    spec = QuantizerSpec(bits=8, **SPECS[kind])
    scale, zero_point = step_in_bins * histogram.width, 0 if spec.symmetric else 77
    found = squared_errors(histogram, torch.tensor([scale]), torch.tensor([float(zero_point)]), spec)
    expected = 0.0
    points = (np.arange(2000) + 0.5) / 2000 * histogram.width
    for i in np.flatnonzero(histogram.counts.numpy()):
        x = float(histogram.edges[i]) + points
        expected += int(histogram.counts[i]) * squared_error(x, float(np.float32(scale)), zero_point, spec) / len(x)
    assert float(found) == pytest.approx(expected, rel=2e-5)


def test_the_mse_range_clips_an_outlier_of_four_bits():
    x = torch.cat([torch.linspace(0, 1, 10_000), torch.tensor([3.0])])
    scale, _ = observe(QuantizerSpec(bits=4, signed=False, observer="mse"), x).qparams()
    assert float(scale) * 15 < 1.2
    scale, _ = observe(QuantizerSpec(bits=4, signed=False, observer="minmax"), x).qparams()
    assert float(scale) * 15 == pytest.approx(3.0)


# --- Ranks -----------------------------------------------------------------------------------------------------------


def batches_of_rank(rank: int) -> list[torch.Tensor]:
    """Three batches on rank 0, two on rank 1, of different ranges; those of the later steps are negative."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(64, 8, generator=generator) * (1 + 7 * rank) - 50.0 * step for step in range(3 - rank)]


def calibrate_one_of_two(rank: int) -> dict[str, object]:
    result: dict[str, object] = {}
    for name in NAMES:
        observer = observe(affine(name), *batches_of_rank(rank))
        observer.synchronize()
        result[name] = observer.qparams()
        if name == "mse":
            result["counts"] = observer.histogram.counts
        lonely = observe(affine(name), *(batches_of_rank(0) if rank == 0 else []))
        lonely.synchronize()
        result[f"{name}, one rank without data"] = lonely.qparams()
        make_observer(affine(name)).synchronize()
    result["range"] = synchronized_range(torch.tensor([1.0 + rank, -3.0]), torch.tensor([5.0, -2.0 + rank]))
    return result


def test_two_ranks_see_what_one_sees_with_all_the_data(tmp_path):
    results = on_two_ranks(calibrate_one_of_two, tmp_path)
    first, second = batches_of_rank(0), batches_of_rank(1)
    steps = [torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), first[2]]
    for result in results:
        for name in NAMES:
            assert result[name] == observe(affine(name), *steps).qparams(), name
            assert result[f"{name}, one rank without data"] == observe(affine(name), *first).qparams(), name
        assert torch.equal(result["counts"], histogram_of(*first, *second).counts)
        low, high = result["range"]
        assert (low.tolist(), high.tolist()) == ([1.0, -3.0], [5.0, -1.0])


def test_without_a_process_group_synchronizing_changes_nothing():
    observer = observe(affine("mse"), torch.tensor([-1.0, 2.0]))
    before = observer.qparams()
    observer.synchronize()
    assert observer.qparams() == before
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    assert synchronized_range(low, high) == (low, high)
