"""`QATFxModule`: the flow of TI's documentation, on a plain module and a Hugging Face one; its schedule by epochs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError, StageError, WeightsError
from hf_qat.model.calibration import calibrate
from hf_qat.model.fx_module import QATFxModule
from hf_qat.model.prepare import prepare_qat
from hf_qat.model.switches import fake_quant_disabled
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import LABELS, hand_written, resnet, spread


SIZE = 16


def images(batch: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def labels(batch: int = 8) -> Tensor:
    return torch.arange(batch) % LABELS


def logits(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def wrap(make: Callable[[], nn.Module] = hand_written, epochs: int = 4, **options: object) -> QATFxModule:
    return QATFxModule(make(), total_epochs=epochs, example_inputs=images(1), **options)


def train_one_epoch(wrapper: QATFxModule, optimizer: torch.optim.Optimizer) -> float:
    wrapper.train()
    total = 0.0
    for seed in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits(wrapper(images(seed=seed))), labels())
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    return total


def trained(make: Callable[[], nn.Module] = hand_written, epochs: int = 2) -> QATFxModule:
    wrapper = wrap(make, epochs)
    optimizer = torch.optim.SGD(wrapper.parameters(), 1e-3)
    for _ in range(epochs):
        train_one_epoch(wrapper, optimizer)
    return wrapper.eval()


@pytest.mark.parametrize(
    "make",
    [hand_written, pytest.param(resnet, marks=[pytest.mark.slow])],
    ids=["plain module", "Hugging Face model"],
)
def test_the_flow_of_the_documentation(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    float_model = spread(make(), 7).eval()
    epochs = 4

    model = QATFxModule(make(), total_epochs=epochs, example_inputs=images(1))
    model.module.load_state_dict(float_model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(epochs):
        losses.append(train_one_epoch(model, optimizer))
        model.eval()
        with torch.no_grad():
            trained_logits = logits(model(images()))
    assert losses[-1] < losses[0]

    torch.save(model.module.state_dict(), tmp_path / "qat.pth")
    again = QATFxModule(make(), total_epochs=epochs, example_inputs=images(1))
    again.module.load_state_dict(torch.load(tmp_path / "qat.pth", weights_only=True))
    again.eval()
    assert torch.equal(logits(again(images())), trained_logits)

    model = model.convert()
    assert isinstance(model, QATFxModule)
    converted_logits = logits(model(images()))
    assert torch.equal(converted_logits, trained_logits)

    path = tmp_path / "model.onnx"
    torch.onnx.export(model.module, images(1), path, opset_version=18, dynamo=True)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    layers = sum(isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) for module in float_model.modules())
    assert operators["Conv"] + operators["Gemm"] + operators["MatMul"] == layers
    assert operators["QuantizeLinear"] > layers  # the image, and something behind every layer
    assert operators["BatchNormalization"] == 0
    # A near-tie that float sums in another order flip is one code of 255, and the layers behind may amplify it.
    difference = np.abs(run(path, images(1)) - converted_logits[:1].numpy()).max()
    assert difference <= 0.03 * float(converted_logits.abs().max())


def run(path: Path, pixels: Tensor) -> np.ndarray:
    """What ONNX Runtime computes with its optimizations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]


def test_some_but_not_all_quantizer_keys_are_an_error_that_names_a_missing_one() -> None:
    state = trained().module.state_dict()
    del state["body.weight_quantizer.log2_scale"]
    with pytest.raises(WeightsError, match=r"body\.weight_quantizer\.log2_scale"):
        wrap().module.load_state_dict(state)


def test_the_state_dict_is_that_of_the_module_under_the_prefix() -> None:
    wrapper = wrap()
    assert list(wrapper.state_dict()) == [f"module.{key}" for key in wrapper.module.state_dict()]
    wrapper.load_state_dict({f"module.{key}": value for key, value in hand_written().state_dict().items()})


# The schedule

# 5 epochs, batch norm frozen from half of them: before the 4th (3 / 5 = 0.6 ≥ 0.5, and 2 / 5 < 0.5); ranges from 0.8:
# before the 5th (4 / 5).
BY_HAND = [
    "batch norm live",
    "batch norm live",
    "batch norm live",
    "batch norm frozen",
    "ranges frozen",
]


def scheduled(epochs: int = 5) -> QATFxModule:
    return wrap(epochs=epochs, qat_config=QATConfig(freeze_bn_at=0.5, freeze_ranges_at=0.8))


def test_train_advances_the_schedule_by_one_epoch_and_eval_does_not() -> None:
    wrapper, phases = scheduled(), []
    for _ in range(5):
        wrapper.train()
        phases.append(wrapper.schedule.phase)
        wrapper.eval()
        wrapper.eval()
        assert wrapper.schedule.phase == phases[-1]
    assert phases == BY_HAND


def test_each_phase_freezes_what_it_says() -> None:
    wrapper = scheduled()
    calibrate(wrapper.module, [images()])
    optimizer = torch.optim.SGD(wrapper.parameters(), 1e-2, momentum=0.9)
    moved = []
    for _ in range(5):
        before = copy.deepcopy(wrapper.module.state_dict())
        train_one_epoch(wrapper, optimizer)
        after = wrapper.module.state_dict()
        changed = {key for key in after if not torch.equal(after[key], before[key])}
        assert "head.weight" in changed
        moved.append(
            {
                "batch norm": any(key.endswith("running_mean") for key in changed),
                "ranges": any(key.endswith(("log2_scale", "offset")) for key in changed),
            }
        )
    live, frozen = {"batch norm": True, "ranges": True}, {"batch norm": False, "ranges": True}
    assert moved == [live, live, live, frozen, {"batch norm": False, "ranges": False}]


def test_frozen_scales_get_no_gradient() -> None:
    wrapper = scheduled()
    for _ in range(5):
        wrapper.train()
    nn.functional.cross_entropy(wrapper(images()), labels()).backward()
    gradients = {key: parameter.grad for key, parameter in wrapper.module.named_parameters()}
    assert all(gradient is None for key, gradient in gradients.items() if key.endswith(("log2_scale", "offset")))
    assert gradients["head.weight"] is not None


def test_one_epoch_is_enough_for_a_training() -> None:
    wrapper = trained(epochs=1)
    assert all(int(quantizer.observed) > 0 for quantizer in fake_quantizers(wrapper.module).values())


def test_training_longer_than_announced_stays_in_the_last_phase() -> None:
    wrapper = scheduled()
    for _ in range(7):
        wrapper.train()
    assert wrapper.schedule.phase == "ranges frozen"


def test_a_deep_copy_has_a_schedule_of_its_own() -> None:
    wrapper = scheduled()
    twin = copy.deepcopy(wrapper)
    for _ in range(5):
        twin.train()
    assert (twin.schedule.phase, wrapper.schedule.phase) == ("ranges frozen", "batch norm live")
    assert all(layer.batch_norm_frozen for layer in qat_layers(twin.module).values())
    assert not any(layer.batch_norm_frozen for layer in qat_layers(wrapper.module).values())


@pytest.mark.parametrize("epochs", [0, -1, 2.5, True, None])
def test_a_number_of_epochs_that_makes_no_sense_is_refused_before_the_model_is_touched(epochs: object) -> None:
    model = hand_written()
    with pytest.raises(ConfigError, match="total_epochs must be a whole number from 1"):
        QATFxModule(model, epochs, example_inputs=images(1))
    assert type(model) is type(hand_written())


# The first ranges


def test_the_first_training_batch_gives_the_ranges_that_calibrating_on_it_gives() -> None:
    wrapper = wrap()
    wrapper.train()(images())
    reference = prepare_qat(hand_written(), example_inputs=images(1))
    calibrate(reference, [images()], bias_correction=False)
    for (path, quantizer), expected in zip(
        fake_quantizers(wrapper.module).items(), fake_quantizers(reference).values(), strict=True
    ):
        assert torch.equal(quantizer.scale, expected.scale), path


def test_the_first_training_batch_changes_no_weight_and_leaves_gradients_to_flow() -> None:
    float_model = hand_written()
    wrapper = wrap()
    wrapper.train()
    nn.functional.cross_entropy(wrapper(images()), labels()).backward()
    state = wrapper.module.state_dict()
    for key, value in float_model.state_dict().items():
        assert torch.equal(state[key], value), key
    assert wrapper.training and wrapper.module.training
    # Learned scales, that of the output too, must have theirs.
    for key, parameter in wrapper.module.named_parameters():
        assert parameter.grad is not None, key


def test_later_batches_do_not_give_the_ranges_anew() -> None:
    """Only what has outgrown its range by half does, see `hf_qat.model.outgrown`."""
    wrapper = wrap()
    wrapper.train()(images())
    before = copy.deepcopy(wrapper.module.state_dict())
    wrapper(images(seed=1))
    wrapper.train()(images(seed=1))
    after = wrapper.module.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key.endswith(("log2_scale", "offset")))


def test_float_weights_loaded_between_two_epochs_get_ranges_of_their_own() -> None:
    wrapper = trained()
    wrapper.module.load_state_dict(spread(hand_written(), 7).state_dict())
    wrapper.train()(images())
    reference = prepare_qat(spread(hand_written(), 7), example_inputs=images(1))
    calibrate(reference, [images()], bias_correction=False)
    for (path, quantizer), expected in zip(
        fake_quantizers(wrapper.module).items(), fake_quantizers(reference).values(), strict=True
    ):
        assert torch.equal(quantizer.scale, expected.scale), path


def test_ranges_frozen_from_the_start_are_collected_all_the_same() -> None:
    wrapper = wrap(qat_config=QATConfig(freeze_bn_at=0.0, freeze_ranges_at=0.0))
    wrapper.train()(images())
    quantizers = fake_quantizers(wrapper.module).values()
    assert all(int(quantizer.observed) > 0 and quantizer.frozen for quantizer in quantizers)


def test_calibration_beforehand_is_respected() -> None:
    wrapper = wrap()
    calibrate(wrapper.module, [10 * images(seed=3)])
    before = copy.deepcopy(wrapper.module.state_dict())
    wrapper.train()(images())
    after = wrapper.module.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key.endswith(("log2_scale", "offset")))


@pytest.mark.parametrize("keyword", [False, True], ids=["images by position", "images by keyword"])
def test_labels_by_keyword_give_the_loss_of_the_model_and_ranges_from_the_images(keyword: bool) -> None:
    wrapper = wrap(resnet).train()
    output = wrapper(pixel_values=images(), labels=labels()) if keyword else wrapper(images(), labels=labels())
    assert all(int(quantizer.observed) == 1 for quantizer in fake_quantizers(wrapper.module).values())
    expected = nn.functional.cross_entropy(output.logits, labels())
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)


def test_evaluation_before_there_are_ranges_is_an_error_that_says_what_to_do() -> None:
    wrapper = wrap().eval()
    with pytest.raises(StageError, match="calibrate"):
        wrapper(images())
    with torch.no_grad(), fake_quant_disabled(wrapper.module):
        expected = hand_written().eval()(images())
        torch.testing.assert_close(wrapper(images()), expected, rtol=0, atol=1e-4)
    with pytest.raises(StageError, match="calibrate"):
        wrapper(images())


# After conversion


def test_a_converted_wrapper_cannot_be_trained() -> None:
    wrapper = trained().train().convert()
    assert not wrapper.training and not wrapper.module.training
    with pytest.raises(StageError, match="converted"):
        wrapper.train()
    wrapper.eval()


def test_converting_without_ranges_is_an_error() -> None:
    with pytest.raises(StageError, match="no range"):
        wrap().convert()
