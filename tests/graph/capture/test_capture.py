from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from hf_qat.errors import CaptureError
from hf_qat.graph.capture.capture import Parts, capture
from hf_qat.graph.capture.meta_device import MetaCapture
from hf_qat.graph.captured import CapturedModule, captured_modules
from tests.models import HUGGING_FACE, Case, HandWritten, hand_written, resnet, spread, vit


@dataclass
class Captured:
    """A model twice: as it was, and captured."""

    case: Case
    float_model: nn.Module
    model: nn.Module
    children: dict[str, CapturedModule]


#: Nets that take long to capture, of which tests/coverage trains a step in every run.
LONG = ("mobilenet_v2", "swin", "segformer", "detr")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in HUGGING_FACE],
)
def captured(request: pytest.FixtureRequest) -> Captured:
    case = HUGGING_FACE[request.param]
    float_model = case.make().eval()
    float_model.set_attn_implementation("eager")
    model = copy.deepcopy(float_model)
    return Captured(case, float_model, model, capture(model, {"pixel_values": case.pixels(2)}))


@torch.no_grad()
def test_logits_and_loss_equal_the_float_models_bit_for_bit_at_any_batch_size(captured):
    for batch in (1, 3, 8):
        inputs = {"pixel_values": captured.case.pixels(batch), "labels": captured.case.labels(batch)}
        expected, result = captured.float_model(**inputs), captured.model(**inputs)
        assert expected.logits.std() > 0.1
        assert torch.equal(result.logits, expected.logits)
        assert torch.equal(result.loss, expected.loss)


def test_state_dict_and_classes_stay_what_they_were(captured):
    before, after = captured.float_model.state_dict(), captured.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for path, module in captured.float_model.named_modules():
        assert isinstance(captured.model.get_submodule(path), type(module))


def test_no_operation_of_a_graph_writes_in_place_but_through_a_view(captured):
    for child in captured.children.values():
        for node in child.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                made = node.args[0].target
                assert made._schema.arguments[0].alias_info is not None, f"{node.target} writes into {made}"


@torch.no_grad()
def test_a_deep_copy_computes_the_same_on_parameters_of_its_own(captured):
    pixels = captured.case.pixels(2)
    expected = captured.model(pixels).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also what pyproject.toml leaves out for the exporter
        twin = copy.deepcopy(captured.model)
    assert torch.equal(twin(pixels).logits, expected)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert not torch.equal(twin(pixels).logits, expected)
    assert torch.equal(captured.model(pixels).logits, expected)


def test_a_captured_model_moves_to_another_device(captured):
    moved = copy.deepcopy(captured.model).to("meta")
    logits = moved(captured.case.pixels(3).to("meta")).logits
    assert logits.device.type == "meta"
    assert logits.shape == captured.float_model(captured.case.pixels(3)).logits.shape


def operations(children: dict[str, CapturedModule]) -> list[tuple[str, str, str]]:
    return [(path, node.op, str(node.target)) for path, child in children.items() for node in child.graph.nodes]


def constants(children: dict[str, CapturedModule]) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": value
        for path, child in children.items()
        for name, value in child.named_buffers()
        if name.split(".")[-1].startswith("_constant_")
    }


@pytest.mark.parametrize(
    "name", ["resnet", "vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin", "detr"))]
)
def test_capture_on_the_meta_device_gives_the_same_operations_and_constants(name):
    case = HUGGING_FACE[name]
    here, there = case.make().eval(), case.make().eval().to("meta")
    for model in (here, there):
        model.set_attn_implementation("eager")
    children = capture(here, {"pixel_values": case.pixels(2)})
    with MetaCapture():
        on_meta = capture(there, {"pixel_values": case.pixels(2)})
    assert operations(on_meta) == operations(children)
    expected, result = constants(children), constants(on_meta)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[key], value) for key, value in expected.items())
    assert all(parameter.is_meta for parameter in there.parameters())


def test_a_check_of_values_holds_where_there_are_none():
    with MetaCapture():
        torch._check_tensor_all(torch.zeros(2, device="meta") == 1)
    with pytest.raises(RuntimeError, match="meta"):
        torch._check_tensor_all(torch.zeros(2, device="meta") == 1)


FOUND = {
    "nonzero": lambda x: [x.nonzero()],
    "nonzero as a tuple": lambda x: [*torch.nonzero(x, as_tuple=True)],
    "argwhere": lambda x: [torch.argwhere(x)],
    "where": lambda x: [*torch.where(x > 0)],
    "selected": lambda x: [x.masked_select(x > 0), torch.masked_select(x, x[:1] > 0)],
    "indexed": lambda x: [x[x > 0], x[None, x > 0], x[0, x[0] > 0, None], x[0], x[:, None], x[torch.nonzero(x)[:, 0]]],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_by_value_is_all_or_half_of_each_row_where_there_are_none(name):
    """Against ones, of which all are found, and against a row of ones and zeros."""
    for part, row in ((1, [1.0, 1.0, 1.0, 1.0]), (0.5, [1.0, 0.0, 0.0, 1.0])):
        x = torch.tensor([row] * 3)
        with MetaCapture(part):
            found = FOUND[name](x.to("meta"))
        assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in FOUND[name](x)]


class Follows(nn.Module):
    """A constant is brought to wherever its input is, as SuperPoint has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x / torch.tensor([2.0, 4.0]).to(x))


def test_a_constant_that_follows_its_input_has_its_value_on_the_meta_device():
    with MetaCapture():
        children = capture(Follows().eval().to("meta"), torch.randn(2, 2))
    assert [value.tolist() for value in constants(children).values()][-1] == [2.0, 4.0]
    assert not any(value.is_meta for value in constants(children).values())


def test_a_number_that_was_made_on_the_cpu_fills_a_tensor_without_values():
    """LightGlue."""
    x, no = torch.ones(2, 3, dtype=torch.bool, device="meta"), torch.tensor(False)
    with MetaCapture():
        assert x.masked_fill(x, no).shape == torch.masked_fill(x, x, False).shape == (2, 3)
    with pytest.raises(RuntimeError, match="device"):
        x.masked_fill(x, no)


def test_two_ways_of_where_select_by_a_mask_as_before():
    x = torch.zeros(2, 3, device="meta")
    with MetaCapture():
        assert torch.where(x > 0, x, 1.0).shape == torch.where(x > 0, input=x, other=x).shape == (2, 3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_captured_model_can_be_cast(dtype):
    for float_model in (resnet().eval(), hand_written().eval()):
        model = copy.deepcopy(float_model)
        capture(model, torch.randn(2, 3, 32, 32))
        model, float_model, x = model.to(dtype), float_model.to(dtype), torch.randn(3, 3, 32, 32, dtype=dtype)
        result, expected = model(x), float_model(x)
        if not isinstance(result, Tensor):
            result, expected = result.logits, expected.logits
        assert result.dtype == dtype
        assert torch.equal(result, expected)


@torch.no_grad()
def test_a_hand_written_network_is_captured_as_a_whole():
    model = hand_written().eval()
    twin = copy.deepcopy(model)
    children = capture(model, torch.randn(2, 3, 32, 32))
    assert list(children) == [""]
    assert isinstance(model, HandWritten)
    assert list(model.state_dict()) == list(twin.state_dict())
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 32, 32)
        assert torch.equal(model(x), twin(x))


def test_parameters_stay_the_same_objects():
    model = vit(layers=1)
    before = dict(model.named_parameters())
    capture(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_the_children_of_a_task_model_are_linked_where_one_feeds_the_next():
    model = resnet()
    children = capture(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert list(children) == ["resnet", "classifier"]
    assert isinstance(model.resnet, transformers.ResNetModel)
    # The pooled features are the second output of the body, and reach the classifier as they are.
    assert children["classifier"].producer_of_input == {0: ("resnet", 1)}
    assert children["resnet"].producer_of_input == {}


class Structured(nn.Module):
    """Takes and returns nested structures, and has keyword arguments with constants."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: float = 1.0, flag: bool = False) -> dict:
        first, second = pair
        return {"sum": (x + first) * scale, "rest": [second, None, "text"], "flag": flag}


def test_nested_arguments_and_results_keep_their_structure():
    model = Structured()
    a, b, c = (torch.randn(2, 4) for _ in range(3))
    capture(model, {"x": a, "pair": (b, c), "scale": 2.0})
    x, y, z = (torch.randn(5, 4) for _ in range(3))
    result = model(x, pair=(y, z), scale=2.0)
    assert torch.equal(result["sum"], (x + y) * 2)
    assert torch.equal(result["rest"][0], z)
    assert result["rest"][1:] == [None, "text"] and result["flag"] is False
    assert list(inspect.signature(model.forward).parameters) == ["x", "pair", "scale", "flag"]


class Dropouts(nn.Module):
    """Three ways to write dropout; the last one as Hugging Face's attention does, with probability 0 in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.drop(x),
            functional.dropout(x, 0.5, self.training),
            functional.dropout(x, p=0.2 if self.training else 0.0, training=self.training),
        )


def test_dropout_follows_train_and_eval():
    model = Dropouts().eval()
    capture(model, torch.ones(2, 100))
    x = torch.ones(100, 100)
    assert all(torch.equal(y, x) for y in model(x))
    for y, probability in zip(model.train()(x), (0.3, 0.5, 0.2), strict=True):
        assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - probability)).item()}
        assert abs((y == 0).float().mean().item() - probability) < 0.02
    assert all(torch.equal(y, x) for y in model.eval()(x))


def test_dropout_draws_the_same_numbers_as_the_float_model():
    float_model = vit(layers=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).eval()
    float_model.set_attn_implementation("eager")
    model = copy.deepcopy(float_model)
    x = torch.randn(2, 3, 32, 32)
    capture(model, {"pixel_values": x})
    results = []
    for candidate in (float_model.train(), model.train()):
        torch.manual_seed(7)
        results.append(candidate(x).logits)
    assert torch.equal(*results)
    assert not torch.equal(results[0], float_model.eval()(x).logits)


def test_capture_leaves_the_mode_and_the_random_state_alone():
    model = vit(layers=1, hidden_dropout_prob=0.1)
    model.train()
    model.vit.layernorm.eval()
    state = torch.get_rng_state()
    capture(model, {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.vit.training and not model.vit.layernorm.training


class DataDependent(nn.Module):
    """Control flow that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the message must name
            x = -x
        return self.linear(x)


class TaskModel(nn.Module):
    """A body that can be captured, a head that cannot, and a forward that takes labels, as a task model's does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = DataDependent()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.body(x))


def line_of(cls: type, text: str) -> int:
    lines, start = inspect.getsourcelines(cls)
    return start + next(k for k, line in enumerate(lines) if text in line)


def test_data_dependent_control_flow_stays_python_and_is_named_with_module_and_line(caplog):
    model = spread(TaskModel())
    x = torch.randn(5, 4)
    expected = model(x)
    with caplog.at_level("WARNING"):
        assert list(capture(model, torch.randn(2, 4))) == ["body", "head.linear"]
    assert type(model.head) is DataDependent
    assert "the code of head itself stays float" in caplog.text
    assert f"{__file__}:{line_of(DataDependent, 'must name')}" in caplog.text
    assert torch.equal(model(x), expected)


class Reads(nn.Module):
    """Nothing but control flow that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the message must name
            x = -x
        return x * self.scale


def test_what_cannot_be_captured_at_all_is_refused_with_module_and_line_and_the_model_stays_as_it_was():
    model = nn.Sequential(Reads())
    before = {path: (type(m), m.training, set(vars(m))) for path, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 4)
    expected = model(x)
    with pytest.raises(CaptureError) as caught:
        capture(model, torch.randn(2, 4))
    message = str(caught.value)
    assert message.startswith("Sequential ")
    assert f"{__file__}:{line_of(Reads, 'must name')}" in message
    assert "exclude=" in message
    assert {path: (type(m), m.training, set(vars(m))) for path, m in model.named_modules()} == before
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert torch.equal(model(x), expected)


def test_the_advice_to_exclude_the_child_works():
    model = spread(TaskModel())
    x = torch.randn(5, 4)
    expected = model(x)
    assert list(capture(model, torch.randn(2, 4), Parts(lambda path: path == "head"))) == ["body"]
    assert type(model.head) is DataDependent
    assert torch.equal(model(x), expected)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 12) if x.shape[0] == 2 else x.reshape(x.shape[0], -1)


def test_a_forward_that_fixes_the_batch_size_is_refused():
    with pytest.raises(CaptureError, match=r"FixedBatch fixes dimension 0 of its input 0 to 2"):
        capture(FixedBatch(), torch.randn(2, 12))


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Structured()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.child(x, (x, x), scale=1.0)["sum"] + self.child(x, (x, x), scale=3.0)["sum"]


def test_a_child_that_is_called_in_two_ways_has_a_graph_for_each():
    model, twin = TwoWays(), TwoWays()
    assert len(capture(model, torch.randn(2, 4))["child"].graphs) == 4  # two of evaluation, two of training
    x = torch.randn(5, 4)
    for mode in (False, True):
        assert torch.equal(model.train(mode)(x), twin(x))


class ManyWays(TwoWays):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return sum(self.child(x, (x, x), scale=float(k))["sum"] for k in range(1, 6))


def test_a_child_that_is_called_in_too_many_ways_is_refused():
    with pytest.raises(CaptureError, match=r"child is called in 10 ways .* 8 graphs"):
        capture(ManyWays(), torch.randn(2, 4))


def test_example_inputs_on_which_the_model_does_not_run_are_named():
    model = resnet()
    with pytest.raises(
        CaptureError, match=r"ResNetForImageClassification .*\(\(2, 5, 32, 32\) torch.float32\).*example_inputs="
    ):
        capture(model, {"pixel_values": torch.randn(2, 5, 32, 32)})
    assert not captured_modules(model)


def test_another_image_size_than_the_captured_one_is_refused():
    model = hand_written()
    capture(model, torch.randn(2, 3, 32, 32))
    with pytest.raises(CaptureError, match=r"HandWritten was captured for x of shape \(any, 3, 32, 32\) and got "):
        model(torch.randn(2, 3, 48, 48))
    with pytest.raises(CaptureError, match=r"got \(3, 32, 32\)"):
        model(torch.randn(3, 32, 32))


def test_an_argument_that_was_not_captured_is_refused_and_a_default_is_not():
    model = vit(layers=1)
    x = torch.randn(2, 3, 32, 32)
    capture(model, {"pixel_values": x})
    expected = model(x).logits
    assert torch.equal(model(x, interpolate_pos_encoding=False).logits, expected)
    with pytest.raises(CaptureError, match=r"ViTModel is called with interpolate_pos_encoding other than"):
        model(x, interpolate_pos_encoding=True)
