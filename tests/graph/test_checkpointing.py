"""Gradient checkpointing of captured graphs: the float model's gradients, by blocks that are computed twice."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_qat import QATConfig, calibrate, fake_quant_disabled, freeze_batch_norm, freeze_ranges, prepare_qat
from hf_qat.errors import StageError
from hf_qat.graph.checkpointing import checkpointed_blocks
from hf_qat.quantization.layers import QATLayer, qat_layers
from tests.models import HUGGING_FACE, checkpoint_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.conv(x))))


class Stack(nn.Module):
    """Blocks with batch norm and dropout; what marks them is on the module that loops over them."""

    def __init__(self, loops: int = 1) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.ModuleList(Block() for _ in range(3)),
            nn.Linear(4, 2),
        )
        self.loops = loops

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return self.head(x.mean((2, 3)))


class Writes(Stack):
    """Its second block begins by writing to what the first one has made."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = nn.Sequential(nn.ReLU(inplace=True), Block())


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a step of training; all calls come before the backward pass."""
    torch.manual_seed(1)
    model.zero_grad()
    outputs = [getattr(found, "logits", found) for found in map(model.train(), batches)]
    sum(out.square().mean() for out in outputs).backward()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{str(k): out.detach() for k, out in enumerate(outputs)}, **gradients, **dict(model.named_buffers())}


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Inside, calls of quantized layers are counted, by path."""
    counts: Counter[str] = Counter()
    names = {layer: path for path, layer in qat_layers(model).items()}
    compute = QATLayer.compute

    def counting(layer: QATLayer, *arguments: object) -> Tensor:
        counts[names[layer]] += 1
        return compute(layer, *arguments)

    QATLayer.compute = counting
    try:
        yield counts
    finally:
        QATLayer.compute = compute


def mark(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing = True
    return model


RECIPES: dict[str, Callable[[], QATConfig]] = {
    "learned": QATConfig,
    "ranges that follow": lambda: QATConfig(activations={"learned": False, "observer": "moving_average"}),
    "codes kept": lambda: QATConfig(save_memory=True),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["batch norm live", "frozen"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_is_the_same_to_the_last_bit_and_blocks_are_computed_twice(recipe, frozen):
    model = calibrate(prepare_qat(Stack(), RECIPES[recipe](), images()), [images()])
    freeze_batch_norm(model, frozen)
    other = mark(copy.deepcopy(model))
    expected = step(model, images(1), images(2))
    with counted(other) as counts:
        found = step(other, images(1), images(2))
    assert found.keys() == expected.keys()
    differ = {name for name in found if not torch.equal(found[name], expected[name])}
    # Of codes, gradients of scales are known by a byte's worth; what is computed again keeps no codes.
    assert {name for name in differ if recipe != "codes kept" or "quantizer" not in name} == set()
    assert counts == {"stem": 2, "head": 2, **{f"blocks.{k}.conv": 4 for k in range(3)}}


FLOAT: dict[str, Callable[[], nn.Module]] = {
    "once": Stack,
    "blocks called in turns": lambda: Stack(loops=2),
    "a block that writes": Writes,
}


@pytest.mark.parametrize("kind", FLOAT)
def test_without_rounding_it_is_the_float_model(kind):
    float_model = FLOAT[kind]()
    model = mark(prepare_qat(copy.deepcopy(float_model), example_inputs=images()))
    freeze_batch_norm(model, False)
    with fake_quant_disabled(model):
        found = step(model, images(1))
    expected = step(float_model, images(1))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin", "segformer", "detr"))]
)
def test_layers_that_transformers_marks_are_computed_twice(name):
    case = HUGGING_FACE[name]
    model = prepare_qat(case.make(), None, case.pixels(2))
    calibrate(model, [case.pixels(2)])
    other = copy.deepcopy(model)
    checkpoint_layers(other)
    expected = step(model, case.pixels(2, 1))
    with counted(other) as counts:
        found = step(other, case.pixels(2, 1))
    assert {name for name in found if not torch.equal(found[name], expected[name])} == set()
    assert set(counts.values()) == {1, 2} and Counter(counts.values())[2] > 1
    checkpoint_layers(other, False)
    with counted(other) as counts:
        step(other, case.pixels(2, 1))
    assert set(counts.values()) == {1}


class Layer(GradientCheckpointingLayer):
    pass


def test_blocks_are_layers_of_transformers_and_else_what_a_marked_module_loops_over():
    model = nn.ModuleDict({"one": mark(Stack()), "one_more": nn.Sequential(mark(Layer()), Layer()), "other": Stack()})
    found = checkpointed_blocks(dict(model.named_modules()))
    assert found == {**{f"one.blocks.{k}": True for k in range(3)}, "one_more.0": True, "one_more.1": False}
    del model["one"].gradient_checkpointing, model["one_more"][0].gradient_checkpointing
    assert checkpointed_blocks(dict(model.named_modules())) == {}


def test_evaluation_computes_nothing_twice():
    model = mark(calibrate(prepare_qat(Stack(), None, images()), [images()])).eval()
    with counted(model) as counts:
        model(images()).sum().backward()
    assert set(counts.values()) == {1}


def test_a_switch_between_forward_and_backward_is_refused():
    model = mark(calibrate(prepare_qat(Stack(), None, images()), [images()])).train()
    with fake_quant_disabled(model):
        loss = model(images()).sum()
    with pytest.raises(StageError, match="blocks.2 is computed again in backward"):
        loss.backward()


@pytest.mark.parametrize("scheme", [{}, {"learned": False, "observer": "moving_average"}], ids=["learned", "followed"])
def test_a_checkpoint_of_the_users_own_is_exact_or_refused(scheme: dict):
    """Against the same steps without one; what moves in training would move twice."""
    model = prepare_qat(Stack(), QATConfig(activations=scheme), images())
    calibrate(model, [images()]).train()
    loss = checkpoint(model, images(1), use_reentrant=False).square().sum()
    with pytest.raises(StageError, match="checkpoint around Stack computes it again"):
        loss.backward()
    model.zero_grad()
    freeze_batch_norm(model)
    freeze_ranges(model)
    other = copy.deepcopy(model)
    for one in (lambda x: checkpoint(model, x, use_reentrant=False), other):
        torch.manual_seed(1)
        one(images(1)).square().sum().backward()
    ours, expected = ({n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (model, other))
    assert ours.keys() == expected.keys() and len(ours) > 10
    assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())


def test_a_mark_on_what_has_no_blocks_is_warned_of(caplog):
    model = prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), None, images())
    mark(model[0])
    calibrate(model, [images()]).train()
    model(images()), model(images())
    assert caplog.text.count("Gradient checkpointing has no effect") == 1
