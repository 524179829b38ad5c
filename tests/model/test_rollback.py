from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_qat import QATConfig, calibrate, prepare_qat
from hf_qat.errors import NonFiniteError
from hf_qat.model import prepare as passes
from hf_qat.model.rollback import unchanged_on_failure
from tests.models import resnet, vit


class Interrupted(Exception):
    pass


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout2d(0.1, inplace=True),
        nn.Flatten(),
        nn.Linear(288, 4),
    )


MODELS = {"plain": (plain, 8), "ResNet": (resnet, 32), "ViT": (vit, 32)}

#: Of `prepare_qat`, in order.
PASSES = [
    "_use_eager_attention",
    "capture",
    "make_plan",
    "operations",
    "_drop_out_of_place",
    "synchronize_batch_norms",
    "rewrite",
    "fuse",
    "place",
    "connect",
    "_make_norms_freezable",
    "_follow_model",
    "initialize_weight_scales",
    "install_hooks",
    "attach_quantization_config",
]


def everything(model: nn.Module) -> list[object]:
    """Class and attributes of each module, with the entries of its dicts and sets, by identity; and the config."""
    seen: list[object] = [list(model.state_dict())]
    for path, module in model.named_modules():
        seen.append((path, type(module)))
        for name, value in vars(module).items():
            entries = [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else None
            seen.append((name, id(value), set(value) if isinstance(value, set) else entries))
    config = getattr(model, "config", None)
    return [*seen, None if config is None else (config.to_dict(), config._attn_implementation)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("plain", name) for name in PASSES[:-1]), *(("ResNet", name) for name in PASSES[::-6]), ("ViT", PASSES[0])],
)
def test_a_pass_that_fails_leaves_the_model_as_it_was(kind, name, monkeypatch):
    make, size = MODELS[kind]
    model, x = make().eval(), torch.randn(2, 3, size, size)
    before, values = everything(model), {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    original = getattr(passes, name)

    def fails(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise Interrupted

    config = QATConfig(sync_batch_norm=True)
    with monkeypatch.context() as patch:
        patch.setattr(passes, name, fails)
        with pytest.raises(Interrupted):
            prepare_qat(model, config, x)
    assert everything(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])
    result = model(x)
    torch.testing.assert_close(
        getattr(result, "logits", result), getattr(expected, "logits", expected), rtol=0, atol=0
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_the_model_can_be_prepared_once_it_is_mended(value):
    model, x = plain(), torch.randn(2, 3, 8, 8)
    before = everything(model)
    with torch.no_grad():
        model[5].weight[0, 0] = value
    with pytest.raises(NonFiniteError, match=r"cannot prepare: 5\.weight of Sequential holds (NaN|infinity)"):
        prepare_qat(model, example_inputs=x)
    assert everything(model) == before
    with torch.no_grad():
        model[5].weight[0, 0] = 0.0
    calibrate(prepare_qat(model, example_inputs=x), [x])


def test_a_handle_from_before_still_removes_its_hook_afterwards():
    model, calls = nn.Sequential(nn.Linear(2, 2)), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(KeyboardInterrupt), unchanged_on_failure(model):
        model.register_forward_hook(lambda *_: calls.append(2))
        raise KeyboardInterrupt
    model(torch.zeros(1, 2))
    handle.remove()
    model(torch.zeros(1, 2))
    assert calls == [1]
