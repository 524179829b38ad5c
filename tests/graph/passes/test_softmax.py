from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_qat import QATConfig, calibrate, prepare_qat
from hf_qat.graph.passes.softmax import LONGEST_FIXED_ROW
from hf_qat.quantization.quantizer import fake_quantizers


#: What the rounding to 8 bits of everything else may cost: (float model − prepared model) / float model.
NOISE = 0.05


class MaskedAttention(nn.Module):
    """Attention of 4 tokens to each other, with 2 more that a mask, the second input, hides."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)
        self.mask = mask

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        query, key, value = (3 * self.projection(x)).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / 8**0.5
        return self.mask(scores, keep[:, None]).softmax(-1) @ value


class MaskedPooling(nn.Module):
    """A sum of tokens, weighted by scores that a linear layer gives."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.score = nn.Linear(8, 1)
        self.mask = mask

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        weights = self.mask(5 * self.score(x).squeeze(-1), keep).softmax(-1)
        return (weights.unsqueeze(1) @ x).squeeze(1)


MASKS = {
    "where": lambda scores, keep: torch.where(keep, scores, -1e9),
    "where, the other way round": lambda scores, keep: torch.where(~keep, -1e9, scores),
    "where, of minus infinity": lambda scores, keep: torch.where(keep, scores, float("-inf")),
    "masked_fill": lambda scores, keep: scores.masked_fill(~keep, -1e9),
    "masked_fill, of minus infinity": lambda scores, keep: scores.masked_fill(~keep, float("-inf")),
    "addition": lambda scores, keep: scores + (1 - keep.float()) * -1e4,
    "addition to the mask": lambda scores, keep: (1 - keep.float()) * -1e4 + scores,
    "subtraction": lambda scores, keep: scores - (1 - keep.float()) * 1e4,
    "product and addition": lambda scores, keep: scores * keep.float() + (1 - keep.float()) * -1e9,
    "moved after the mask": lambda scores, keep: scores.masked_fill(~keep, -1e9).unsqueeze(1).squeeze(1),
    "scaled after the mask": lambda scores, keep: scores.masked_fill(~keep, -1e9) / 2**0.5,
}


def tokens(seed: int, count: int = 6) -> Tensor:
    return torch.randn(8, count, 8, generator=torch.Generator().manual_seed(seed))


def error_of(model: nn.Module, *inputs: Tensor) -> float:
    """Relative error of the prepared and calibrated `model` against itself in float."""
    wanted = copy.deepcopy(model).eval()(*inputs)
    prepared = calibrate(prepare_qat(model, QATConfig(), inputs), [inputs]).eval()
    return float((prepared(*inputs) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", [MaskedAttention, MaskedPooling], ids=["behind a product", "behind a linear layer"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_mask_that_comes_in_does_not_set_the_range_of_the_scores(kind, mask):
    torch.manual_seed(0)
    keep = (torch.arange(6) < 4).expand(8, 6)
    model = kind(mask)
    with torch.no_grad():
        assert error_of(model, tokens(1), keep) < NOISE
    scales = [float(quantizer.scale.detach().max()) for quantizer in fake_quantizers(model).values()]
    assert max(scales) < 1
    assert {"belongs to the softmax after it"} <= {reason for _, _, reason in model.float_operations}


def test_a_bias_that_layers_compute_from_data_is_rounded_as_the_scores_are():
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection, self.bias = nn.Linear(8, 6), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (self.projection(x) + self.bias(x)).softmax(-1) @ x

    model = prepare_qat(Biased(), QATConfig(), tokens(1))
    assert "add_0_quantizer" in fake_quantizers(model)


class FlatAttention(nn.Module):
    """Attention to all tokens nearly alike."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (0.1 * self.projection(x)).chunk(3, -1)
        return (query @ key.transpose(1, 2)).softmax(-1) @ value


@pytest.mark.parametrize("count", [16, 32, 48, 96, 256, 512, 1000])
def test_flat_attention_over_any_number_of_tokens_is_right(count):
    torch.manual_seed(0)
    model = FlatAttention()
    with torch.no_grad():
        assert error_of(model, tokens(1, count) + 1) < NOISE  # with one scale for all: 512 tokens 0.21, 1000 0.9
    fixed = model.softmax_0_quantizer.spec.fixed_scale
    assert fixed == (1 / 256 if count <= LONGEST_FIXED_ROW else None)
    assert model.softmax_0_quantizer.spec.qmin == 0 and model.softmax_0_quantizer.spec.symmetric


def sqnr(exact: np.ndarray, rounded: np.ndarray) -> float:
    """Signal to quantization noise, in decibels."""
    return float(10 * np.log10((exact**2).sum() / ((exact - rounded) ** 2).sum()))


@pytest.mark.parametrize(("target", "gain"), [("int8", 30), ("AM68A", 30), ("TDA4VM", 20)])
def test_attention_of_a_vit_over_197_tokens_has_a_scale_of_its_own(target: str, gain: float):
    """Of transformers' own probabilities a fixed 1/256, in numpy, leaves 14 dB; TDA4VM has half of the codes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, initializer_range=0.1, attn_implementation="eager")
    model, images = transformers.ViTForImageClassification(config).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        exact = model(images, output_attentions=True).attentions[0]
        model = calibrate(prepare_qat(model, QATConfig(target), images), [images], bias_correction=False)
        (quantizer,) = (q for path, q in fake_quantizers(model).items() if "softmax" in path)
        rounded = quantizer(exact).numpy()
    fixed = np.round(exact.numpy() * 256).clip(0, 255) / 256
    assert exact.shape[-1] == 197
    assert sqnr(exact.numpy(), rounded) > sqnr(exact.numpy(), fixed) + gain


def test_at_4_bits_even_a_row_of_24_has_a_scale_of_its_own():
    torch.manual_seed(0)
    x = tokens(1, 24) + 1
    model = calibrate(prepare_qat(FlatAttention().eval(), QATConfig("w4a4"), x), [x])
    quantizer = model.softmax_0_quantizer
    assert quantizer.spec.bits == 4 and quantizer.spec.fixed_scale is None
    flat = torch.full((24,), 1 / 24)
    with torch.no_grad():  # a sixteenth in place of each: half as much again
        torch.testing.assert_close(quantizer(flat), flat, rtol=0.1, atol=0)


@pytest.mark.parametrize(("classes", "names"), [(10, {"1.activation_quantizer"}), (768, set())], ids=str)
def test_a_long_row_of_probabilities_that_is_returned_stays_float(classes, names):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, classes), nn.Softmax(-1))
    with torch.no_grad():
        assert error_of(model, tokens(1)[:, 0]) < NOISE
    assert set(fake_quantizers(model)) == {
        "input_quantizer",
        "0.weight_quantizer",
        "0.activation_quantizer",
        *names,
    }
    reasons = [reason for _, operation, reason in model.float_operations if "softmax" in operation]
    assert reasons == ([] if names else ["many probabilities, which are returned or compared"])


class Peaks(nn.Module):
    """Key points, as SuperPoint finds them: probabilities that are the largest around them, and above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv2d(3, 65, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = nn.functional.pixel_shuffle(self.scores(x).softmax(1)[:, :-1], 8)
        largest = places == nn.functional.max_pool2d(places, 9, 1, 4)
        return torch.where(largest & (places > 0.01), places, torch.zeros_like(places))


def test_peaks_among_many_probabilities_are_not_rounded_to_one_plain():
    """Rounded to a 256th, a flat row of 65 has the same number everywhere, and each place is the largest around it."""
    torch.manual_seed(0)
    model, images = Peaks().eval(), torch.rand(2, 3, 16, 16)
    wanted = int((model(images) > 0).sum())
    prepared = calibrate(prepare_qat(model, QATConfig("int8"), images), [images])
    found = int((prepared(images) > 0).sum())
    assert wanted < 1000 and abs(found - wanted) < 0.2 * wanted
    assert not any("softmax" in path for path in fake_quantizers(prepared))
