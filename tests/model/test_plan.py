"""What the recipe comes to, module by module; what it should come to is worked out by hand."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

from hf_qat import QATConfig, prepare_qat
from hf_qat.config.targets import TensorScheme
from hf_qat.graph.capture.capture import Parts, capture
from hf_qat.graph.plan import Plan
from hf_qat.model.plan import make_plan
from hf_qat.quantization.layers import qat_layers
from hf_qat.quantization.quantizer import fake_quantizers
from tests.models import resnet, yolos


X = torch.randn(2, 4)


def plan(*arguments: object, layers: int = 4, **options: object) -> Plan:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    config = QATConfig(*arguments, **options)
    return make_plan(model, capture(model, X, Parts(config.excludes)), config, X)


def bits(*arguments: object, **options: object) -> dict[str, int]:
    """Bits of each quantizer of four linear layers, `w` of a weight and `a` of what comes out."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    prepare_qat(model, QATConfig(*arguments, **options), X)
    kinds = {"weight_quantizer": "w", "activation_quantizer": "a"}
    found = {tuple(path.rpartition(".")[::2]): q.spec.bits for path, q in fake_quantizers(model).items()}
    return {f"{kinds[name]}{layer}" if layer else "input": width for (layer, name), width in found.items()}


#: Four linear layers on `w4a4`.
W4A4 = {"input": 8, "w0": 8, "a0": 4, "w1": 4, "a1": 4, "w2": 4, "a2": 8, "w3": 8, "a3": 8}


@pytest.mark.parametrize("width", [2, *(pytest.param(bits, marks=[pytest.mark.slow]) for bits in (3, 4, 5)), 16])
@pytest.mark.parametrize("kinds", ["w", "a", "wa"])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_the_bits_of_an_override_hold_at_the_edges_too_whatever_their_number(layer, kinds, width):
    names = {"w": "weights", "a": "activations"}
    changes = {str(layer): {names[kind]: {"bits": width} for kind in kinds}}
    assert bits("w4a4", overrides=changes) == W4A4 | {f"{kind}{layer}": width for kind in kinds}


def test_an_override_of_something_else_leaves_an_edge_its_bits():
    changes = {"*": {"weights": {"observer": "minmax"}, "activations": {"observer": "minmax"}}}
    assert bits("w4a4", overrides=changes) == W4A4


def test_bits_for_the_whole_model_leave_its_edges_at_least_the_targets():
    assert bits("w4a4", weights={"bits": 2}) == W4A4 | {"w1": 2, "w2": 2}
    assert bits("w4a4", weights={"bits": 16}) == W4A4 | dict.fromkeys(("w0", "w1", "w2", "w3"), 16)


def test_a_target_of_one_width_has_no_edges_and_runs_no_model():
    assert set(bits("int8").values()) == {8}
    assert not plan("int8").edges.outputs


def test_each_module_has_its_schemes_and_a_reason():
    found = plan("w4a8", exclude="1", overrides={"2": {"activations": {"bits": 16}}}, layers=5).modules
    assert {path: module.why for path, module in found.items()} == {
        "": "target w4a8",
        "0": "the first layer",
        "1": "excluded by the recipe",
        "2": "overrides of the recipe",
        "3": "target w4a8",
        "4": "feeds an output of the model",
    }
    assert [path for path, module in found.items() if module.excluded] == ["1"]
    affine = TensorScheme(symmetric=False)
    assert found["3"].weights == TensorScheme(bits=4, per_channel=True)
    assert found["4"].weights == TensorScheme(bits=8, per_channel=True)
    assert found["3"].activations == found["3"].wide_activations == affine
    assert found["2"].activations == TensorScheme(bits=16, symmetric=False)


def test_the_weight_of_a_module_is_signed_and_symmetric_along_its_channels():
    found = plan("w4a8", weights={"learned": False, "observer": "moving_average"}).modules["1"].weight_spec(1)
    assert (found.qmin, found.qmax, found.axis, found.observer) == (-7, 7, 1, "minmax")
    assert plan("TDA4VM").modules["1"].weight_spec(1).axis is None


def test_what_stays_wide_is_logged_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, "hf_qat"):
        plan("w4a4", overrides={"3": {"weights": {"bits": 2}}})
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_qat.model.plan"]
    assert messages == ["0: 8 bits, the first layer", "3: 2 bits, overrides of the recipe"]


def test_a_module_of_two_names_has_a_plan_under_both():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    found = make_plan(model, capture(model, X), QATConfig(), X)
    assert set(found.modules) == {"", "0", "1", "2"}
    assert set(found.below("2")) == {""} and set(found.below("")) == {"", "0", "1", "2"}


def upernet() -> nn.Module:
    """With an auxiliary head, which is called last and whose output is for the loss alone."""
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        num_labels=4,
        use_auxiliary_head=True,
        auxiliary_in_channels=16,
        auxiliary_channels=8,
        pool_scales=[1, 2],
    )
    return transformers.UperNetForSemanticSegmentation(config)


@pytest.mark.parametrize(
    ("make", "size", "wide"),
    [
        (resnet, 32, {"resnet.embedder.embedder.convolution", "classifier.1"}),
        pytest.param(
            upernet,
            64,
            {"backbone.embedder.embedder.convolution", "decode_head.classifier"},
            marks=[pytest.mark.slow],
        ),
        (
            yolos,
            32,
            {
                "vit.embeddings.patch_embeddings.projection",
                "class_labels_classifier.layers.2",
                "bbox_predictor.layers.2",
            },
        ),
    ],
)
def test_the_heads_of_a_task_model_keep_8_bits_all_of_them_and_no_other(make, size, wide):
    model = prepare_qat(make(), QATConfig("w4a4"), {"pixel_values": torch.randn(2, 3, size, size)})
    widths = {path: layer.weight_quantizer.spec.bits for path, layer in qat_layers(model).items()}
    assert {path for path, width in widths.items() if width == 8} == wide
    heads = [path for path in wide if "embed" not in path]
    for path in heads:
        layer = model.get_submodule(path)
        assert layer.quantizer_of_input.spec.bits == 8, path
        assert layer.activation_quantizer.spec.bits == 8, path
