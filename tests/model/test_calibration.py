from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_qat import QATConfig, calibrate, fake_quant_disabled, freeze_ranges, prepare_qat
from hf_qat.errors import CalibrationError, StageError
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import hand_written, made_once, resnet, spread


BY_EXTREMES = {"observer": "minmax"}


def batches(count: int = 3, size: int = 4) -> list[Tensor]:
    return list(torch.randn(count, size, 3, 32, 32, generator=torch.Generator().manual_seed(5)))


@made_once
def prepared(target: str = "int8", **options: object) -> nn.Module:
    return prepare_qat(hand_written().eval(), QATConfig(target, **options), torch.zeros(2, 3, 32, 32))


def ranges(data: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Least and greatest value over all batches of what each quantizer sees, from the float model's own modules."""
    model = hand_written().eval()
    seen: dict[str, list[Tensor]] = {"x": list(data)}
    for path in ("stem_norm", "body_norm", "head"):
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.setdefault(path, []).append(output)
        )
    with torch.no_grad():
        for x in data:
            model(x)
    relu = [torch.relu(x) for x in seen["stem_norm"]]
    total = [torch.clamp(a + b, 0, 6) for a, b in zip(seen["body_norm"], relu, strict=True)]
    joined = [torch.cat(pair, 1) for pair in zip(relu, total, strict=True)]
    values = {
        "x_quantizer": seen["x"],
        "body.activation_quantizer": seen["body_norm"],
        "cat_0_quantizer": joined,
        "mean_0_quantizer": [x.mean((2, 3)) for x in joined],
        "head.activation_quantizer": seen["head"],
    }
    return {path: (min(v.min().item() for v in x), max(v.max().item() for v in x)) for path, x in values.items()}


def test_scales_and_zero_points_are_those_of_the_extremes():
    data = batches()
    model = calibrate(prepared(activations=BY_EXTREMES), data, bias_correction=False)
    found = ranges(data)
    for path, (low, high) in found.items():
        quantizer = model.get_submodule(path)
        if path in ("cat_0_quantizer", "mean_0_quantizer"):  # not negative: zero_point 0
            assert quantizer.zero_point is None
            low = 0.0
        else:
            zero_point = round(-low / ((high - low) / 255))
            assert quantizer.zero_point.round().item() == pytest.approx(zero_point, abs=1)
        assert quantizer.scale.item() == pytest.approx((high - low) / 255, rel=1e-4)
    activations = {path for path in fake_quantizers(model) if not path.endswith("weight_quantizer")}
    assert activations == set(found)


def test_power_of_two_scales_cover_the_extremes_and_no_more():
    data = batches()
    model = calibrate(prepared("TDA4VM", activations=BY_EXTREMES), data, bias_correction=False)
    for path, (low, high) in ranges(data).items():
        codes = 255 if path in ("cat_0_quantizer", "mean_0_quantizer") else 127
        expected = 2.0 ** np.ceil(np.log2(max(high / codes, -low / 128 if codes == 127 else 0.0)))
        assert model.get_submodule(path).scale.item() == expected


def test_weight_scales_are_those_of_the_folded_weights():
    model = prepared(weights=BY_EXTREMES)
    calibrate(model, batches(), bias_correction=False)
    norm, weight = model.stem_norm, model.stem.weight.detach().double().numpy()
    factor = (norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()).numpy()
    folded = weight * factor[:, None, None, None]
    np.testing.assert_allclose(
        model.stem.weight_quantizer.scale.detach(), np.abs(folded).max((1, 2, 3)) / 127, rtol=1e-5
    )


def test_every_quantizer_has_a_range_afterwards_and_none_had_before():
    model = prepared()
    assert all(q.observed == 0 for q in fake_quantizers(model).values())
    calibrate(model, batches())
    assert all(q.observed > 0 and q.observer is None and q.enabled for q in fake_quantizers(model).values())


def test_calibration_is_by_running_statistics_and_leaves_them_and_the_mode_alone():
    model = prepared().train()
    model.body_norm.eval()
    before = {name: value.clone() for name, value in model.named_buffers() if "norm" in name}
    calibrate(model, batches())
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.training and model.stem_norm.training and not model.body_norm.training
    twin = calibrate(prepared(), batches())
    for path, quantizer in fake_quantizers(twin).items():
        assert torch.equal(fake_quantizers(model)[path].scale, quantizer.scale)


def test_without_bias_correction_no_float_parameter_changes():
    model = prepared()
    before = copy.deepcopy(model.state_dict())
    calibrate(model, batches(), bias_correction=False)
    for key, value in before.items():
        assert "quantizer" in key or torch.equal(model.state_dict()[key], value), key


class Counting:
    """An iterable that says how much was taken from it."""

    def __init__(self, data: list[Tensor]) -> None:
        self.data, self.taken = data, 0

    def __iter__(self) -> Iterator[Tensor]:
        for x in self.data:
            self.taken += 1
            yield x


def test_num_batches_limits_what_is_taken_and_seen():
    data = batches(4)
    data[2] *= 100
    counting = Counting(data)
    model = calibrate(prepared(activations=BY_EXTREMES), counting, num_batches=2)
    assert counting.taken == 2
    low, high = min(x.min().item() for x in data[:2]), max(x.max().item() for x in data[:2])
    assert model.x_quantizer.scale.item() == pytest.approx((high - low) / 255, rel=1e-4)


def test_a_generator_is_enough():
    expected, model = calibrate(prepared(), batches()), prepared()
    calibrate(model, (x for x in batches()))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.state_dict().items())


def test_a_data_loader_a_tuple_and_a_dict_with_labels_give_the_same_scales():
    x = torch.cat(batches())
    labels = torch.zeros(len(x), dtype=torch.int64)
    pixels = {"pixel_values": x[:2]}
    prepared, scales = prepare_qat(resnet().eval(), QATConfig(activations=BY_EXTREMES), pixels), []
    for data in (
        [x[:4], x[4:8], x[8:]],
        [(x[:4],), (x[4:8],), (x[8:],)],
        DataLoader(TensorDataset(x), batch_size=4),
        DataLoader([{"pixel_values": a, "labels": b} for a, b in zip(x, labels, strict=True)], batch_size=4),
    ):
        model = calibrate(copy.deepcopy(prepared), data)
        scales.append([q.scale.detach() for q in fake_quantizers(model).values()])
    for other in scales[1:]:
        assert all(torch.equal(a, b) for a, b in zip(scales[0], other, strict=True))


def test_images_and_labels_in_one_tuple_are_refused_with_what_to_write():
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.zeros(4)), batch_size=2)
    with pytest.raises(CalibrationError, match=r"batch 0 does not fit HandWritten.forward.*images for images, labels"):
        calibrate(prepared(), loader)


def test_frozen_ranges_stay():
    model = calibrate(prepared(), batches())
    before = copy.deepcopy(model.state_dict())
    freeze_ranges(model)
    calibrate(model, [10 * x for x in batches()], bias_correction=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def nan(x: Tensor) -> Tensor:
    x[1, 0, 3, 3] = float("nan")
    return x


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "got no batches"),
        (iter(()), "got no batches"),
        ([torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], r"batch 0 holds torch.uint8 only: .*image processor"),
        ([{"x": torch.zeros(2, 3, 32, 32, dtype=torch.int64)}], r"batch 0 holds torch.int64 only"),
        ([torch.zeros(2, 3, 32, 32), nan(torch.zeros(2, 3, 32, 32))], r"batch 1 holds NaN or infinity"),
        ([torch.zeros(2, 3, 32, 32, dtype=torch.float64)], r"batch 0 holds torch.float64, .* are torch.float32"),
        ([torch.full((2, 3, 32, 32), float("inf"))], r"batch 0 holds NaN or infinity"),
    ],
    ids=["empty", "exhausted", "uint8", "int64", "nan", "float64", "inf"],
)
def test_data_that_no_range_can_come_of_is_refused_and_nothing_changes(data, message):
    model = prepared().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, data)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(q.observer is None and q.enabled for q in fake_quantizers(model).values())
    assert all(module.training for module in model.modules())


class Normalizing(nn.Module):
    """Takes raw pixels, and normalises them itself, outside of the part that is captured."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net((pixel_values.float() - 127.5) / 64).logits}


def test_raw_pixels_of_a_model_that_normalises_them_itself_are_calibrated_on():
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)}
    model = prepare_qat(Normalizing(resnet()).eval(), QATConfig(), batch)
    with fake_quant_disabled(model):
        expected = model(**batch)["logits"]
    calibrate(model, [batch])
    assert (model(**batch)["logits"] - expected).norm() < 0.1 * expected.norm()


def test_calibrating_with_no_batches_of_many_is_refused():
    with pytest.raises(CalibrationError, match="got no batches"):
        calibrate(prepared(), batches(), num_batches=0)


def test_a_float_model_cannot_be_calibrated():
    with pytest.raises(StageError, match=r"cannot calibrate: HandWritten is a float model. Call prepare_qat"):
        calibrate(hand_written(), batches())


def test_calibration_makes_the_model_nearly_the_float_one():
    x = torch.cat(batches(4, 8))
    model = prepare_qat(spread(hand_written()).eval(), QATConfig(), x[:2])
    with torch.no_grad():
        wild = model(x)
        calibrate(model, [x])
        result = model(x)
        with fake_quant_disabled(model):
            expected = model(x)
    assert (result - expected).norm() < 0.03 * expected.norm() < (wild - expected).norm()


def test_a_quantizer_that_has_seen_nothing_is_calibrated_although_ranges_are_frozen():
    model, data = freeze_ranges(prepared(activations=BY_EXTREMES)), batches()
    calibrate(model, data, bias_correction=False)
    low, high = ranges(data)["x_quantizer"]
    assert model.x_quantizer.scale.item() == pytest.approx((high - low) / 255, rel=1e-5)
    assert all(int(quantizer.observed) == 1 for quantizer in fake_quantizers(model).values())


def test_the_first_forward_without_ranges_says_so_once_and_names_quantizers(caplog):
    model, x = prepared().eval(), batches()[0]
    for _ in range(2):
        model(x)
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "HandWritten computes with ranges that were never collected" in said and "x_quantizer" in said
    assert "calibrate(model, batches)" in said


def test_a_forward_after_calibration_or_in_float_says_nothing(caplog):
    model, x = prepared().eval(), batches()[0]
    with fake_quant_disabled(model):
        model(x)
    calibrate(model, [x])
    model(x)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
