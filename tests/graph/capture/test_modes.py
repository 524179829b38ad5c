import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_qat import calibrate, convert, fake_quant_disabled, freeze_batch_norm, prepare_qat
from hf_qat.graph.capture.modes import batch_norms_of_one_process
from hf_qat.graph.captured import captured_modules


class Detector(nn.Module):
    """A backbone with dropout and batch norm, and a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class KeepsBodyFrozen(Detector):
    """Frozen by `train` itself, as detectors of MMDetection do."""

    def train(self, mode: bool = True) -> "KeepsBodyFrozen":
        super().train(mode)
        self.body.eval()
        return self


def frozen_by_hand() -> nn.Module:
    model = Detector().train()
    model.body.eval()
    return model


MADE = {"by hand": frozen_by_hand, "by train": lambda: KeepsBodyFrozen().train()}


@pytest.mark.parametrize("how", MADE)
def test_a_frozen_part_has_no_dropout_and_the_rest_has(how, caplog):
    torch.manual_seed(0)
    float_model, x = MADE[how](), torch.randn(8, 4)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    assert [*captured_modules(model)] == [""] and not model.body.training and model.head.training
    freeze_batch_norm(model, False)
    for _ in range(2):
        with fake_quant_disabled(model):
            torch.manual_seed(1)
            ours = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, float_model(x))
    torch.testing.assert_close(model.body[1].running_mean, float_model.body[1].running_mean)
    assert "the graph computes it as in" not in caplog.text


def test_a_part_that_is_unfrozen_later_is_named(caplog):
    x = torch.randn(8, 4)
    model = prepare_qat(frozen_by_hand(), example_inputs=x)
    calibrate(model, [x])
    model.train()
    model(x), model(x)
    assert caplog.text.count("body of Detector is in training, and the graph computes it as in evaluation") == 1


def test_a_dropout_whose_probability_is_changed_later_is_named(caplog):
    x = torch.randn(8, 4)
    model = calibrate(prepare_qat(Detector(), example_inputs=x), [x])
    model.eval()(x), model.train()(x)
    assert "probability" not in caplog.text
    model.head[0].p = 0.1
    model.eval()(x)
    assert "probability" not in caplog.text
    model.train()
    model(x), model(x)
    assert caplog.text.count("head.0 of Detector has the probability 0.1 now, and the graph goes on with 0.5") == 1


def test_a_captured_part_that_is_frozen_as_a_whole_can_be_unfrozen():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.5,
    )
    float_model = transformers.ViTForImageClassification(config).train()
    float_model.set_attn_implementation("eager")
    float_model.vit.eval()
    x = torch.randn(2, 3, 16, 16)
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=x)
    for unfrozen in (False, True):
        if unfrozen:
            model.train(), float_model.train()
        with fake_quant_disabled(model):
            torch.manual_seed(1)
            ours = model(x).logits
        torch.manual_seed(1)
        torch.testing.assert_close(ours, float_model(x).logits)


@pytest.mark.slow
def test_biases_that_are_kept_for_evaluation_do_not_stand_in_the_way_of_the_proof():
    """LeViT keeps them with their graph of gradients, which a first backward pass frees."""
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    model = transformers.LevitForImageClassification(config)
    prepare_qat(model)
    assert [*captured_modules(model)] == ["levit", "classifier"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)], id="after a convolution"),
        pytest.param(lambda: [nn.BatchNorm2d(3, momentum=None), nn.ReLU(), nn.Conv2d(3, 4, 3)], id="alone"),
    ],
)
def test_a_batch_norm_without_momentum_averages_all_batches_in_a_graph_too(make):
    torch.manual_seed(0)
    float_model = nn.Sequential(*make()).train()
    model = prepare_qat(copy.deepcopy(float_model), example_inputs=torch.randn(4, 3, 8, 8))
    assert [*captured_modules(model)] == [""]
    freeze_batch_norm(model, False)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        with fake_quant_disabled(model):
            torch.testing.assert_close(model(x), float_model(x))
    buffers = dict(model.named_buffers())
    for name, expected in float_model.named_buffers():
        torch.testing.assert_close(buffers[name], expected)
    with fake_quant_disabled(model):
        torch.testing.assert_close(model.eval()(x), float_model.eval()(x))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_synchronized_batch_norm_is_captured_on_a_cpu_as_the_batch_norm_that_it_is_in_one_process(process_group):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(4, 3, 8, 8)
    prepare_qat(model, example_inputs=x)
    assert [*captured_modules(model)] == [""] and isinstance(model[1], nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        model.train()(x)  # it still waits for the other processes, which is done on accelerators only
    with fake_quant_disabled(model):
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    calibrate(model, [x])
    assert all(type(module).forward is not nn.SyncBatchNorm.forward for module in convert(model).modules())


def test_a_synchronized_batch_norm_waits_for_nobody_inside_and_does_afterwards(process_group):
    norm, x = nn.SyncBatchNorm(3).train(), torch.randn(4, 3)
    twin = nn.BatchNorm1d(3).train()
    with batch_norms_of_one_process(norm):
        torch.testing.assert_close(norm(x), twin(x))
    torch.testing.assert_close(norm.running_var, twin.running_var)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        norm(x)
