"""Histograms against numpy's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_qat import QATConfig, analyze, calibrate, convert, prepare_qat
from hf_qat.model.analysis.histogram import BINS, MARGIN, Histogram, count, edges
from hf_qat.quantization.quantizer import fake_quantizers


def test_counts_are_numpys_and_what_lies_beyond_is_in_the_outer_bins():
    x = torch.cat([torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([-50.0, 70.0, 80.0])])
    found = count(x, (-2.0, 2.0))
    lower, upper = -2.0 - 4 * MARGIN, 2.0 + 4 * MARGIN
    expected, _ = np.histogram(x.numpy().clip(lower, upper), BINS, (lower, upper))
    assert edges((-2.0, 2.0)) == (lower, upper)
    assert np.abs(found.numpy() - expected).sum() <= 2  # a number on an edge may fall to either side
    assert found.sum() == 1003 and found[-1] >= 2 and found[0] >= 1


def test_the_grid_has_every_code():
    assert Histogram((1,), -4.0, 4.0, -3.0, 3.0, 7).grid == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("converted", [False, True], ids=["prepared", "converted"])
def test_an_analysis_has_the_spread_of_weights_and_results(converted, float_model, images):
    model = prepare_qat(copy.deepcopy(float_model), QATConfig("w4a8"), images[0])
    calibrate(model, images, bias_correction=False)
    scale = fake_quantizers(model)["second.weight_quantizer"].scale.detach().numpy()
    reach = 255 * fake_quantizers(model)["first.activation_quantizer"].scale.item()
    found = analyze(convert(model) if converted else model, images, float_model, sensitivity=False)
    layers = {layer.path: layer for layer in found.layers}
    weights, results = layers["second"].weights, layers["first"].activations
    assert (weights.first, weights.last, weights.codes) == (-7, 7, 15)
    by_hand, _ = np.histogram(
        (float_model.second.weight.detach().numpy() / scale.reshape(-1, 1, 1, 1)).clip(-8.75, 8.75),
        BINS,
        (-8.75, 8.75),
    )
    assert np.abs(np.array(weights.counts) - by_hand).sum() <= 4
    assert sum(results.counts) == 3 * 8 * 16 * 10 * 10
    assert (results.first, results.last, results.codes) == (0.0, pytest.approx(reach), 256)
