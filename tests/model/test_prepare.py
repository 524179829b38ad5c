from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hf_qat import (
    QATConfig,
    calibrate,
    convert,
    fake_quant_disabled,
    freeze_batch_norm,
    prepare_qat,
    targets,
)
from hf_qat.errors import CaptureError, ConfigError, StageError
from hf_qat.graph.captured import captured_modules
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import HUGGING_FACE, Case, hand_written, resnet, spread, vit


@dataclass
class Prepared:
    """A model twice: as it was, and prepared but not calibrated."""

    case: Case
    float_model: nn.Module
    model: nn.Module

    def inputs(self, batch: int) -> dict[str, object]:
        return {"pixel_values": self.case.pixels(batch), "labels": self.case.labels(batch)}


#: Nets that take long, and are of the kind of others that do not.
LONG = ("mobilenet_v2", "segformer")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in HUGGING_FACE],
)
def prepared(request: pytest.FixtureRequest) -> Prepared:
    case = HUGGING_FACE[request.param]
    float_model = case.make().eval()
    float_model.set_attn_implementation("eager")
    for module in float_model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # stochastic depth is the identity in a captured model
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(), {"pixel_values": case.pixels(2)})
    return Prepared(case, float_model, model)


@torch.no_grad()
def test_with_quantizers_off_logits_and_loss_are_the_float_models(prepared):
    with fake_quant_disabled(prepared.model):
        for batch in (1, 3, 8):
            expected, result = prepared.float_model(**prepared.inputs(batch)), prepared.model(**prepared.inputs(batch))
            tolerance = 1e-4 * expected.logits.abs().max()
            torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=tolerance.item())
            torch.testing.assert_close(result.loss, expected.loss, rtol=1e-4, atol=0)


def test_the_state_dict_keeps_every_float_key_and_adds_quantizers_only(prepared):
    before, after = prepared.float_model.state_dict(), prepared.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for key in after.keys() - before.keys():
        module, name = key.split(".")[-2:]
        assert "quantizer" in module and name in ("log2_scale", "offset", "observed"), key


def test_training_with_quantizers_off_is_the_float_models_training_bit_for_bit(prepared, request):
    # Where float sums come in another order: DETR's batch norms are frozen ones and are folded in training, too, and
    # MobileNetV2's convolutions pad for themselves, which only the gradients of their weights show.
    tolerance = {"detr": 1e-4, "mobilenet_v2": 1e-6}.get(request.node.callspec.params["prepared"], 0.0)
    float_model, model = copy.deepcopy(prepared.float_model).train(), copy.deepcopy(prepared.model).train()
    results = []
    for candidate in (float_model, model):
        torch.manual_seed(3)  # dropout draws the same numbers
        with fake_quant_disabled(model):
            results.append(candidate(**prepared.inputs(3)))
        results[-1].loss.backward()
    expected, result = results
    largest = expected.logits.abs().max().item()
    torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=tolerance * largest)
    torch.testing.assert_close(result.loss, expected.loss, rtol=tolerance, atol=0)
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    for name, value in float_model.named_buffers():
        assert torch.equal(buffers[name], value), name
    for name, parameter in float_model.named_parameters():
        ours, theirs = parameters[name].grad, parameter.grad
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            # Some gradients are zero by mathematics, and noise by rounding: a key's bias, in front of a softmax.
            assert (ours - theirs).norm() <= tolerance * (theirs.norm() + 0.01), name


def test_with_batch_norm_frozen_training_uses_the_running_statistics_and_leaves_them(prepared):
    norms = [name for name, _ in prepared.float_model.named_buffers() if name.endswith("running_mean")]
    if not norms:
        pytest.skip("no batch norm")
    float_model, model = copy.deepcopy(prepared.float_model), freeze_batch_norm(copy.deepcopy(prepared.model)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    for module in float_model.train().modules():  # its own randomness, and running statistics
        module.training &= not isinstance(module, nn.modules.batchnorm._BatchNorm)
    torch.manual_seed(4)
    expected = float_model(**prepared.inputs(3)).logits
    torch.manual_seed(4)
    with fake_quant_disabled(model):
        result = model(**prepared.inputs(3))
    torch.testing.assert_close(result.logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    for name, value in model.named_buffers():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, before[name]), name


def is_frozen(float_model: nn.Module, scale: str) -> bool:
    """Whether nothing of the module that the scale belongs to is trained, as DETR's backbone by default."""
    module = float_model.get_submodule(scale.rpartition(".")[0].rpartition(".")[0])
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def test_gradients_reach_every_parameter_that_the_float_model_trains(prepared):
    float_model, model = copy.deepcopy(prepared.float_model).train(), copy.deepcopy(prepared.model)
    calibrate(model, [{"pixel_values": prepared.case.pixels(4)}])
    float_model(**prepared.inputs(4)).loss.backward()
    trained = {name for name, p in float_model.named_parameters() if p.grad is not None}
    alive = {name for name, p in float_model.named_parameters() if p.grad is not None and p.grad.any()}
    for frozen in (False, True):
        freeze_batch_norm(model, frozen).train().zero_grad()
        model(**prepared.inputs(4)).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        scales = {name for name in gradients if name.endswith((".log2_scale", ".offset"))}
        assert scales
        scales -= {name for name in scales if is_frozen(float_model, name)}
        assert {name for name, gradient in gradients.items() if gradient is not None} == trained | scales
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
        assert {name for name in alive if not gradients[name].any()} == set()


@torch.no_grad()
def test_a_prepared_model_moves_to_another_device(prepared):
    moved = copy.deepcopy(prepared.model).to("meta")
    logits = moved(prepared.case.pixels(2).to("meta")).logits
    assert logits.device.type == "meta"
    assert logits.shape == prepared.model(prepared.case.pixels(2)).logits.shape


def test_a_deep_copy_is_equal_and_trains_on_its_own(prepared):
    model = copy.deepcopy(prepared.model)
    calibrate(model, [{"pixel_values": prepared.case.pixels(4)}])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(prepared.case.pixels(2)).logits
        assert torch.equal(twin(prepared.case.pixels(2)).logits, expected)
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin.train()(**prepared.inputs(4)).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(twin.eval()(prepared.case.pixels(2)).logits, expected)
        assert torch.equal(model(prepared.case.pixels(2)).logits, expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}


@torch.no_grad()
def test_converting_changes_no_number(prepared):
    model = calibrate(copy.deepcopy(prepared.model), [{"pixel_values": prepared.case.pixels(4)}])
    expected = [model(**prepared.inputs(batch)) for batch in (1, 3)]
    convert(model)
    for batch, before in zip((1, 3), expected, strict=True):
        after = model(**prepared.inputs(batch))
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.loss, before.loss)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@torch.no_grad()
def test_a_hand_written_network_keeps_its_numbers_with_quantizers_off():
    float_model = hand_written().eval()
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(), torch.randn(2, 3, 32, 32))
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 32, 32)
        with fake_quant_disabled(model):
            torch.testing.assert_close(model(x), float_model(x), rtol=0, atol=1e-4 * float_model(x).abs().max().item())
        assert not torch.equal(model(x), float_model(x))


def test_a_hand_written_network_trains_as_before_with_quantizers_off():
    float_model = hand_written()
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(), torch.randn(2, 3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    results = []
    for candidate in (float_model, model):
        torch.manual_seed(3)
        with fake_quant_disabled(model):
            results.append(candidate.train()(x))
        results[-1].square().sum().backward()
    assert torch.equal(*results)
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    assert all(torch.equal(buffers[name], value) for name, value in float_model.named_buffers())
    assert all(torch.equal(parameters[name].grad, p.grad) for name, p in float_model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_prepared_model_can_be_cast(dtype):
    model = prepare_qat(hand_written().eval(), QATConfig(), torch.randn(2, 3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    calibrate(model, [x])
    expected = model(x)
    result = model.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0.2, atol=0.1 * expected.abs().max().item())


def test_an_optimizer_made_before_goes_on_working():
    model = hand_written()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter for name, parameter in model.named_parameters()}
    prepare_qat(model, QATConfig(), torch.randn(2, 3, 32, 32))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    old = model.stem.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.stem.weight, old)


def test_example_inputs_are_guessed_from_the_config():
    model = prepare_qat(resnet_of_channels(4))
    assert captured_modules(model)["resnet"].shapes == [(None, 4, 224, 224)]
    model = prepare_qat(vit(layers=1))
    assert captured_modules(model)["vit"].shapes == [(None, 3, 32, 32)]


def resnet_of_channels(channels: int) -> nn.Module:
    model = resnet()
    embedder = model.resnet.embedder
    embedder.embedder.convolution = nn.Conv2d(channels, 8, 7, stride=2, padding=3, bias=False)
    model.config.num_channels = embedder.num_channels = channels
    return spread(model)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict(form):
    x = torch.randn(2, 3, 32, 32)
    inputs = {"tensor": x, "tuple": (x,), "dict": {"pixel_values": x, "labels": torch.tensor([0, 1])}}[form]
    model = prepare_qat(resnet(), None, inputs)
    assert model(x[:1]).logits.shape == (1, 5)


def test_dropout_is_alive_in_a_prepared_model():
    model = prepare_qat(hand_written(), QATConfig(), torch.randn(2, 3, 32, 32))
    x = torch.randn(8, 3, 32, 32)
    calibrate(model, [x])
    model.train()
    model.stem_norm.eval(), model.body_norm.eval()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_what_is_prepared_in_inference_mode_trains_if_the_model_was_not_made_there():
    model, x = hand_written(), torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        prepare_qat(model, QATConfig(), torch.randn(2, 3, 32, 32))
        calibrate(model, [x])
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.inference_mode():
        model = hand_written()
    with pytest.raises(CaptureError, match="stem.weight of .*inference_mode"):
        prepare_qat(model, QATConfig(), x)


SCRIPTS = {"script": torch.jit.script, "trace": lambda module: torch.jit.trace(module, torch.randn(1, 3, 8, 8))}


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_torchscript_is_refused_by_its_path_and_the_model_stays_as_it_is(kind):
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), SCRIPTS[kind](nn.Conv2d(3, 3, 1)))
    expected = model(x)
    with pytest.raises(CaptureError, match="1 of Sequential is TorchScript.*before torch.jit.script"):
        prepare_qat(model, QATConfig(), x)
    assert torch.equal(model(x), expected)
    with pytest.raises(CaptureError, match="the model of .* is TorchScript"):
        prepare_qat(SCRIPTS[kind](nn.Conv2d(3, 3, 1)), QATConfig(), x)


def test_adapters_are_to_be_merged_before():
    # Stands for what peft.get_peft_model puts in the place of a layer.
    adapter = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = nn.Sequential(nn.Linear(4, 4), adapter(4, 4))
    with pytest.raises(CaptureError, match=r"^1 is a Linear of peft.*merge first, by model = model.merge_and_unload"):
        prepare_qat(model, example_inputs=torch.randn(2, 4))


def test_a_compiled_model_is_refused_with_the_order_that_works():
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(nn.Conv2d(3, 4, 3), backend="eager")
    with pytest.raises(CaptureError, match="before torch.compile"):
        prepare_qat(compiled, None, x)
    with pytest.raises(CaptureError, match="^0 of Sequential is compiled: give it as it was before torch.compile"):
        prepare_qat(nn.Sequential(compiled), None, x)
    prepare_qat(compiled._orig_mod, None, x)


def test_a_model_that_is_compiled_in_place_is_refused_and_a_copy_of_it_is_not():
    """Where it had run before, what was compiled then went on computing in float."""
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].compile(backend="eager")
    with pytest.raises(CaptureError, match=r"^0 of Sequential was compiled by compile\(\): prepare the model before"):
        prepare_qat(model, None, x)
    copied = calibrate(prepare_qat(copy.deepcopy(model), None, x), [x]).eval()
    assert not torch.equal(copied(x), model(x))


COMPUTED_WEIGHTS = {
    "weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED_WEIGHTS)
def test_a_model_whose_hooks_compute_weights_can_be_copied_whenever_it_was_trained(kind):
    x = torch.randn(4, 3, 8, 8)
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
    for layer in layers:
        COMPUTED_WEIGHTS[kind](layer)
    model = nn.Sequential(*layers)
    model(x).sum().backward()
    calibrate(prepare_qat(model, QATConfig(), x), [x])
    model.train()(x).sum().backward()
    again = convert(copy.deepcopy(model))
    assert torch.equal(again(x), model.eval()(x))


def test_a_model_in_training_mode_stays_in_it():
    model = prepare_qat(hand_written().train(), QATConfig(), torch.randn(2, 3, 32, 32))
    assert all(module.training for module in model.modules())
    model = prepare_qat(hand_written().eval(), QATConfig(), torch.randn(2, 3, 32, 32))
    assert not any(module.training for module in model.modules())


def unchanged(model: nn.Module, before: dict[str, tuple[type, set[str]]]) -> bool:
    return {path: (type(module), set(vars(module))) for path, module in model.named_modules()} == before


def shape_of(model: nn.Module) -> dict[str, tuple[type, set[str]]]:
    return {path: (type(module), set(vars(module))) for path, module in model.named_modules()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": "clasifier"},
            r"exclude: 'clasifier' matches no module of the model. Did you mean 'classifier'\?",
        ),
        ({"overrides": {"resnet.decoder.*": {"weights": {"bits": 4}}}}, r"overrides: 'resnet.decoder.\*' matches no"),
    ],
    ids=["exclude", "overrides"],
)
def test_a_glob_that_matches_nothing_is_refused_and_the_model_stays_float(options, message):
    model = resnet()
    before = shape_of(model)
    with pytest.raises(ConfigError, match=message):
        prepare_qat(model, QATConfig(**options))
    assert unchanged(model, before)


def test_an_unknown_target_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown target 'int7'.*Did you mean 'int8'\?"):
        QATConfig("int7")


def test_preparing_twice_is_refused():
    x = torch.randn(2, 3, 32, 32)
    model = prepare_qat(hand_written(), QATConfig(), x)
    keys = list(model.state_dict())
    with pytest.raises(StageError, match="HandWritten is prepared already; prepare a copy of the float model"):
        prepare_qat(model, QATConfig(), x)
    assert list(model.state_dict()) == keys
    calibrate(model, [x])
    with pytest.raises(StageError, match="HandWritten is converted already"):
        prepare_qat(convert(model), QATConfig(), x)


def test_a_module_around_what_is_prepared_or_converted_is_refused_and_stays_as_it_is():
    """Its quantizers would be captured as the code of a model, and what is left of it would fail in `convert`."""
    x = torch.randn(2, 3, 32, 32)
    backbone = calibrate(prepare_qat(hand_written(), QATConfig(), x), [x])
    whole = nn.Sequential(backbone, nn.Linear(5, 2)).eval()
    expected = whole(x)
    with pytest.raises(StageError, match="^0 of Sequential is prepared already: prepare the whole with the float"):
        prepare_qat(whole, QATConfig(), x)
    assert torch.equal(whole(x), expected)
    convert(backbone)
    with pytest.raises(StageError, match="^0 of Sequential is converted already"):
        prepare_qat(whole, QATConfig(), x)


def test_a_plain_module_without_example_inputs_is_asked_for_them():
    with pytest.raises(CaptureError, match=r"cannot guess the input of HandWritten: pass example_inputs="):
        prepare_qat(hand_written())


@pytest.mark.parametrize("make", [hand_written, resnet])
@pytest.mark.parametrize("inputs", [(torch.zeros(2, 3, 8, 8),) * 3, {"images": torch.zeros(2, 3, 8, 8)}, "image", 7])
def test_example_inputs_that_do_not_fit_forward_are_refused_and_the_model_stays_float(make, inputs):
    model = make()
    before = shape_of(model)
    with pytest.raises(CaptureError, match=r"inputs"):
        prepare_qat(model, QATConfig(), inputs)
    assert unchanged(model, before)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if bool((x > 0).all()) else -x)


class TaskModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(inplace=True), nn.ReLU())
        self.head = DataDependent()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.body(x))


def test_a_part_that_cannot_be_captured_stays_python_and_its_layers_are_quantized():
    model, x = spread(TaskModel()), torch.randn(5, 4)
    expected = model.eval()(x)
    prepare_qat(model, QATConfig(), torch.randn(2, 4))
    assert list(qat_layers(model)) == ["body.0", "head.linear"]
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected)


def test_excluding_a_part_that_cannot_be_captured_leaves_it_alone():
    model, x = spread(TaskModel()), torch.randn(5, 4)
    expected = model.eval()(x)
    prepare_qat(model, QATConfig(exclude="head"), torch.randn(2, 4))
    with fake_quant_disabled(model):
        torch.testing.assert_close(model(x), expected)
    assert {path.split(".")[0] for path in fake_quantizers(model)} == {"body"}


def test_a_failed_preparation_leaves_the_attention_implementation_alone():
    model = vit(layers=1)
    before = model.config._attn_implementation
    with pytest.raises(CaptureError):
        prepare_qat(model, QATConfig(), {"pixel_values": torch.randn(2, 3, 48, 32)})
    assert model.config._attn_implementation == before


@torch.no_grad()
@pytest.mark.parametrize("target", targets())
def test_every_target_ends_in_a_model_near_the_float_one(target):
    float_model = hand_written().eval()
    x = torch.randn(64, 3, 32, 32)
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(target), x)
    result = convert(calibrate(model, [x]))(x)
    noise = (result - float_model(x)).norm() / float_model(x).norm()
    assert 0 < noise < (0.3 if target.startswith("w4") else 0.05)


class NormWithActivation(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`: more than a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), NormWithActivation(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("excluded", ["body", "head", ["body.1", "body.3"], ["body", "head.0"]], ids=str)
def test_a_frozen_batch_norm_of_an_excluded_part_stands_still_and_computes_by_running_statistics(excluded):
    float_model, x = spread(TwoParts()), torch.randn(4, 3, 8, 8)
    model = prepare_qat(copy.deepcopy(float_model), QATConfig(exclude=excluded), x)
    freeze_batch_norm(model).train()
    with fake_quant_disabled(model):
        result = model(x)
    torch.testing.assert_close(result, float_model.eval()(x), rtol=1e-4, atol=1e-4)
    before, after = dict(float_model.named_buffers()), dict(model.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(module.training for module in model.modules())

    freeze_batch_norm(model, False)(x)
    assert not any(torch.equal(after[name], value) for name, value in before.items() if "running_mean" in name)


@pytest.mark.parametrize("given", ["int8", torch.zeros(1, 3, 32, 32)], ids=["name", "images"])
def test_a_recipe_that_is_none_is_refused(given: object):
    with pytest.raises(ConfigError, match=r"the recipe is ('int8'|a Tensor), and must be a QATConfig"):
        prepare_qat(resnet(), given)
