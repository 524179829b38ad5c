import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError, StageError
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.schedule import PHASES, QATSchedule, is_observed_again, phase_at
from hf_qat.model.switches import freeze_batch_norm, freeze_ranges
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import hand_written, made_once
from tests.training import FOLLOWED, recipe


LIVE, FROZEN, RANGES = PHASES
LETTERS = {"L": LIVE, "F": FROZEN, "R": RANGES}
BATCH = (4, 3, 16, 16)
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


@made_once
def prepared(**changes: object) -> nn.Module:
    model = prepare_qat(hand_written(), recipe(**changes), torch.randn(BATCH))
    return calibrate(model, [torch.randn(BATCH)]).train()


def switches(model: nn.Module) -> str:
    """What the modules themselves will do in the next step, as a letter."""
    norms = {layer.batch_norm_frozen for layer in qat_layers(model).values()}
    ranges = {quantizer.frozen for quantizer in fake_quantizers(model).values()}
    return {(False, False): "L", (True, False): "F", (True, True): "R"}[(*norms, *ranges)]


# One letter for each step from 0 on, two of them beyond the end.
@pytest.mark.parametrize(
    ("total", "freeze_bn_at", "freeze_ranges_at", "expected"),
    [
        (1, 0.5, 0.9, "LRR"),  # 0/1 is before both, 1/1 after both
        (2, 0.5, 0.9, "LFRR"),
        (3, 0.5, 0.9, "LLFRR"),  # 2/3 is past 0.5 and not past 0.9
        (3, 1 / 3, 2 / 3, "LFRRR"),
        (10, 0.5, 0.9, "LLLLLFFFFRRR"),
        (10, 0.0, 0.9, "FFFFFFFFFRRR"),
        (10, 0.0, 0.0, "RRRRRRRRRRRR"),
        (4, 1.0, 1.0, "LLLLRR"),
        (4, 0.5, 0.5, "LLRRRR"),
    ],
)
def test_phases_are_those_worked_out_by_hand(total: int, freeze_bn_at: float, freeze_ranges_at: float, expected: str):
    phases = [phase_at(step, total, freeze_bn_at, freeze_ranges_at) for step in range(total + 2)]
    assert phases == [LETTERS[letter] for letter in expected]


def test_a_fraction_is_not_passed_one_step_late_by_rounding():
    assert 0.55 * 100 > 55  # in floating point
    assert phase_at(54, 100, 0.55, 1.0) == LIVE
    assert phase_at(55, 100, 0.55, 1.0) == FROZEN


@given(st.integers(1, 50), st.floats(0, 1), st.floats(0, 1))
def test_phases_never_go_back(total: int, one: float, other: float):
    phases = [phase_at(step, total, min(one, other), max(one, other)) for step in range(2 * total)]
    order = [PHASES.index(phase) for phase in phases]
    assert order == sorted(order)
    assert phases[total] == RANGES


@pytest.mark.parametrize("total", [1, 2, 3, 8])
def test_the_model_is_in_the_phase_of_every_step_from_the_first_on(total: int):
    model = prepared()
    schedule = QATSchedule(model, total)
    seen, said = "", []
    for _ in range(total + 2):
        seen += switches(model)
        said.append(schedule.phase)
        schedule.step()
    assert seen == {1: "LRR", 2: "LFRR", 3: "LLFRR", 8: "LLLLFFRRRR"}[total]
    assert said == [LETTERS[letter] for letter in seen]


def test_learned_scales_freeze_batch_norm_from_the_first_step():
    model = prepared(freeze_bn_at=None)
    assert QATSchedule(model, 100).phase == FROZEN
    assert switches(model) == "F"


@made_once
def untrained(**changes: object) -> nn.Module:
    """A net from scratch: its batch norms have seen nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    return calibrate(prepare_qat(model, QATConfig(**changes), torch.randn(BATCH)), [torch.randn(BATCH)]).train()


def test_untrained_batch_norms_are_live_until_ranges_freeze(caplog: pytest.LogCaptureFixture):
    model = untrained()
    schedule = QATSchedule(model, 20)
    assert "Batch norm follows the data for the first 90 % of training: 1 batch norms" in caplog.text
    seen = ""
    for _ in range(20):
        seen += switches(model)
        schedule.step()
    assert seen == 18 * "L" + 2 * "R"


def test_a_resumed_schedule_knows_that_batch_norms_were_untrained():
    schedule = QATSchedule(untrained(), 4)
    schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    model = untrained()
    model(torch.randn(BATCH))  # trained now
    resumed = QATSchedule(model, 4)
    assert resumed.phase == FROZEN
    resumed.load_state_dict(state)
    phases = []
    for _ in range(4):
        phases.append(resumed.phase)
        resumed.step()
    assert phases == [LIVE, LIVE, LIVE, RANGES]


def from_scratch() -> tuple[nn.Module, nn.Module]:
    """A net without batch norm that is as it was made, prepared, and in float."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    twin = copy.deepcopy(net)
    config = recipe(activations={"observer": "minmax"}, freeze_bn_at=0.0)
    return calibrate(prepare_qat(net, config, X), [X], bias_correction=False).train(), twin


def test_a_net_from_scratch_learns_in_float_first_and_is_evaluated_quantized(caplog: pytest.LogCaptureFixture):
    model, twin = from_scratch()
    schedule = QATSchedule(model, 8)
    assert "It learns in float for the first 25 % of training" in caplog.text
    in_float = []
    for _ in range(4):
        assert not torch.equal(model.eval()(X), twin(X))
        in_float.append(torch.equal(model.train()(X), twin(X)))
        schedule.step()
    assert in_float == [True, True, False, False]


def test_after_learning_in_float_all_ranges_are_those_of_the_batch():
    model, twin = from_scratch()
    schedule = QATSchedule(model, 4)
    with torch.no_grad():
        for net in (model, twin):
            net[2].weight *= 0.1  # which outgrows nothing
    model(X)
    schedule.step()
    output = fake_quantizers(model)["2.activation_quantizer"]
    found = twin(X).detach()
    spans = 255 * output.scale.item(), (found.max().clamp_min(0) - found.min().clamp_max(0)).item()
    assert spans[0] == pytest.approx(spans[1], rel=1e-4)
    assert fake_quantizers(model)["2.weight_quantizer"].scale.max() < 0.1


def test_a_resumed_schedule_knows_that_the_net_learned_in_float():
    schedule = QATSchedule(from_scratch()[0], 8)
    schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    assert state == {"step": 1, "total_steps": 8, "quantize_at": 0.25}
    model, twin = from_scratch()
    with torch.no_grad():
        for net in (model, twin):
            net[1].bias += torch.arange(8)  # trained now
    resumed = QATSchedule(model, 8)
    assert not torch.equal(model(X), twin(X))
    resumed.load_state_dict(state)
    assert torch.equal(model(X), twin(X))
    resumed.step()
    assert not torch.equal(model(X), twin(X))


def test_a_net_that_is_trained_learns_quantized_from_the_first_step():
    model, twin = from_scratch()
    with torch.no_grad():
        model[1].weight[0] = twin[1].weight[0] = 1.01
    assert "quantize_at" not in QATSchedule(model, 8).state_dict()
    assert not torch.equal(model(X), twin(X))


def test_statistics_of_an_untrained_net_are_as_before_after_calibration():
    assert untrained()[1].running_mean.abs().max() == 0


def test_ranges_are_observed_again_often_at_first():
    """After 1, 2, 4, 8, … steps, and after every twentieth of them."""
    steps = [step for step in range(1, 101) if is_observed_again(step, 100)]
    assert steps == sorted({1, 2, 4, 8, 16, 32, 64, *range(5, 101, 5)})


def test_a_range_that_training_outgrows_is_set_anew_until_ranges_freeze(caplog: pytest.LogCaptureFixture):
    model = prepared()
    schedule = QATSchedule(model, 4)
    layer = list(qat_layers(model).values())[-1]
    factors = []
    for _ in range(4):
        before = layer.weight_quantizer.scale.detach().clone()
        model(torch.randn(BATCH))
        with torch.no_grad():
            layer.weight *= 4
        schedule.step()
        factors.append((layer.weight_quantizer.scale / before).mean().item())
    assert factors == pytest.approx([4, 4, 1, 1], rel=1e-3)  # ranges are frozen after three of four steps
    assert caplog.text.count("Training has outgrown") == 1


@pytest.mark.parametrize("model_is_new", [False, True], ids=["trained", "new"])
def test_few_bits_clip_on_purpose_unless_the_model_was_new(model_is_new: bool):
    model = (untrained if model_is_new else prepared)(weights={"bits": 4})
    schedule = QATSchedule(model, 4)
    layer = list(qat_layers(model).values())[-1]
    before = layer.weight_quantizer.scale.detach().clone()
    model(torch.randn(BATCH))
    with torch.no_grad():
        layer.weight *= 4
    schedule.step()
    assert layer.weight_quantizer.spec.bits == 4
    factor = (layer.weight_quantizer.scale / before).mean().item()
    assert factor == pytest.approx(4 if model_is_new else 1, rel=1e-3)


def test_train_and_eval_do_not_count():
    model = prepared()
    schedule = QATSchedule(model, 4)
    for _ in range(10):
        model.train()
        model.eval()
    assert schedule.phase == LIVE
    assert switches(model) == "L"


def test_the_schedule_takes_over_from_switches_set_by_hand():
    model = freeze_ranges(freeze_batch_norm(prepared()))
    QATSchedule(model, 4)
    assert switches(model) == "L"


def test_a_resumed_schedule_goes_on_where_the_other_was():
    schedule = QATSchedule(prepared(), 4)
    for _ in range(3):
        schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    model = prepared()
    resumed = QATSchedule(model, 1000)
    resumed.load_state_dict(state)
    assert resumed.phase == schedule.phase == RANGES
    assert switches(model) == "R"
    assert resumed.state_dict() == {"step": 3, "total_steps": 4}


def test_going_back_makes_batch_norm_live_again():
    model = prepared()
    schedule = QATSchedule(model, 2)
    schedule.step()
    assert switches(model) == "F"
    schedule.load_state_dict({"step": 0, "total_steps": 2})
    assert switches(model) == "L"


@pytest.mark.parametrize("total", [0, -1, 2.5, True, None])
def test_a_number_of_steps_that_is_none_is_refused(total: object):
    with pytest.raises(ConfigError, match=f"total_steps .* a whole number from 1, not {total}"):
        QATSchedule(prepared(), total)


def test_a_float_model_has_no_schedule():
    with pytest.raises(StageError, match="prepare_qat"):
        QATSchedule(hand_written(), 10)


def test_a_converted_model_has_no_schedule():
    with pytest.raises(StageError, match="converted"):
        QATSchedule(convert(prepared()), 10)


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running_" in name]


def scales(model: nn.Module) -> list[torch.Tensor]:
    return [quantizer.scale.detach().clone() for quantizer in fake_quantizers(model).values()]


def differ(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("changes", [{}, FOLLOWED], ids=["learned", "followed"])
def test_statistics_and_scales_change_in_their_phases_and_no_longer(changes: dict):
    model = prepared(**changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = QATSchedule(model, 4)
    changed = []
    for _ in range(4):
        before = statistics(model), scales(model)
        model(torch.randn(BATCH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed.append((differ(before[0], statistics(model)), differ(before[1], scales(model))))
        schedule.step()
    assert changed == [(True, True), (True, True), (False, True), (False, False)]
