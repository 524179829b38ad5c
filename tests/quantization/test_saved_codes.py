"""What is kept for backward as codes: the same tensors to the last bit, in less memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hf_qat import QATConfig, calibrate, freeze_batch_norm, freeze_ranges, prepare_qat
from hf_qat.graph.captured import captured_modules
from hf_qat.quantization.followed import FOLLOWED
from hf_qat.quantization.kernels import cpu
from hf_qat.quantization.saved_codes import Kept, KeptView, keep_codes, keeps_codes, kept_for_backward
from tests.benchmarks.memory import peak_bytes
from tests.models import HUGGING_FACE
from tests.ranks import on_two_ranks


pytestmark = pytest.mark.usefixtures("each_form")


#: Phase → whether batch norm and whether ranges are frozen.
PHASES = {"live": (False, False), "batch norm frozen": (True, False), "all frozen": (True, True)}

CONFIGS = {"learned": {}, "4-bit weights": {"target": "w4a8"}, "powers of two": {"target": "TDA4VM"}}
CONFIGS["observed"] = {
    "weights": {"learned": False, "observer": "moving_average"},
    "activations": {"learned": False, "observer": "moving_average"},
}


@cache
def prepared(net: str, scheme: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    case = HUGGING_FACE[net]
    model, pixels = case.make(), torch.randn_like(case.pixels(4))
    config = QATConfig(**CONFIGS[scheme], save_memory=True)
    calibrate(prepare_qat(model, config, {"pixel_values": pixels[:2]}), [{"pixel_values": pixels}])
    return model, pixels


def in_both_ways(net: str, scheme: str, phase: str) -> Iterator[tuple[nn.Module, Tensor]]:
    """Two models with the same values: one that saves memory, and one that does not."""
    made, pixels = prepared(net, scheme)
    bn_frozen, ranges_frozen = PHASES[phase]
    for saving in (True, False):
        model = copy.deepcopy(made)
        for module in captured_modules(model).values():
            assert module.saves_memory
            module.saves_memory = saving
        yield freeze_ranges(freeze_batch_norm(model.train(), bn_frozen), ranges_frozen), pixels


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], pixels: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    run(pixels).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain() -> saved_tensors_hooks:
    """Inside, what operations keep for backward is kept as it is."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All but those of scales and offsets, which are near each other."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if "quantizer" not in name or "weight_quantizer" in name:
            assert torch.equal(ours[name], gradient), name
    near = [
        torch.stack([g for name, g in found.items() if "quantizer" in name and not g.dim()] or [torch.zeros(())])
        for found in (ours, theirs)
    ]
    assert (near[0] - near[1]).norm() <= 0.03 * near[1].norm()


def logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda pixels: model(pixel_values=pixels).logits


CASES = [(net, scheme, "batch norm frozen") for net in ("resnet", "vit") for scheme in CONFIGS]
CASES += [("resnet", "learned", "live"), ("resnet", "learned", "all frozen"), ("vit", "learned", "all frozen")]
CASES += [pytest.param("mobilenet_v2", "learned", phase, marks=pytest.mark.slow) for phase in PHASES]


@pytest.mark.parametrize(("net", "scheme", "phase"), CASES)
def test_weights_get_the_same_gradients_to_the_last_bit(net: str, scheme: str, phase: str):
    assert_same(*(gradients(model, logits(model), pixels) for model, pixels in in_both_ways(net, scheme, phase)))


@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_it_is_the_same_under_autocast(net: str):
    found = []
    for model, pixels in in_both_ways(net, "learned", "live"):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, logits(model), pixels))
    assert_same(*found)


def wide(saving: bool, depth: int = 4) -> tuple[nn.Module, Tensor]:
    """Convolutions of which what they keep for backward counts, and hardly anything else."""
    torch.manual_seed(0)
    block = [layer for _ in range(depth) for layer in (nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    model, images = nn.Sequential(*block), torch.randn(2, 8, 128, 128)
    calibrate(prepare_qat(model, QATConfig(save_memory=saving), images), [images])
    return freeze_batch_norm(model.train()), images


def run_and_keep(model: nn.Module, images: Tensor, result: list[Tensor]) -> None:
    result[:] = [model(images)]


def test_two_bytes_a_value_are_kept_of_eight():
    kept = []
    for saving, hooks in ((True, nullcontext), (False, plain), (False, nullcontext)):
        (model, images), result = wide(saving), []
        with hooks():
            peak_bytes(partial(run_and_keep, model, images, result))
            kept.append(peak_bytes(partial(run_and_keep, model, images, result)))
    map_bytes = 4 * 2 * 8 * 128 * 128
    # Of each of four layers, what comes in and what goes out of its quantizer: in float, or a byte each. At the end,
    # while the last one works, there are six more maps.
    assert kept[1] > 8 * map_bytes and kept[0] < (8 / 4 + 6) * map_bytes
    # By default what comes in is kept, in float, and what goes out is not.
    assert kept[2] < kept[1] - 2.9 * map_bytes


def test_the_highest_point_of_a_step_is_lower():
    peaks = []
    for model, pixels in in_both_ways("vit", "learned", "batch norm frozen"):
        step = partial(gradients, model, logits(model), pixels.repeat(16, 1, 1, 1))
        step()
        peaks.append(peak_bytes(step))
    with plain():
        peaks.append(peak_bytes(step))
    assert peaks[0] < 0.7 * peaks[2] and peaks[1] < 0.75 * peaks[2]


def quantized(*shape: int) -> Tensor:
    codes, step = torch.randint(-128, 128, shape).to(torch.int8), torch.tensor(0.0371)
    out = codes.float().add_(100).mul_(step)
    keep_codes(out, codes, 100, step)
    return out


VIEWS = {
    "itself": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, 1:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "flattened": lambda x: x.flatten(1),
    "copied": lambda x: FOLLOWED[torch.ops.aten.contiguous.default](x.transpose(1, 2)),
    "copied into another shape": lambda x: FOLLOWED[torch.ops.aten.reshape.default](x.permute(0, 2, 1, 3), [3, -1]),
    "a view of a copy": lambda x: FOLLOWED[torch.ops.aten.reshape.default](x.permute(0, 2, 1, 3), [3, -1])[:, 4:].t(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_whatever_view_is_kept_comes_back_as_it_was(view: Callable[[Tensor], Tensor]):
    x, weight = quantized(3, 4, 5, 6), torch.ones((), requires_grad=True)
    with kept_for_backward(Kept.CODES):
        seen = view(x)
        out = seen * weight
    assert isinstance(out.grad_fn._raw_saved_self.data, KeptView)  # its codes
    found = out.grad_fn._saved_self
    assert torch.equal(found, seen) and found.stride() == seen.stride()


def test_the_operands_of_a_product_of_matrices_are_kept_as_codes_though_it_copies_them():
    a, b = torch.randn(2, 3, 5, 4, requires_grad=True), quantized(2, 7, 3, 4).permute(0, 2, 3, 1)
    with kept_for_backward(Kept.CODES):
        product = FOLLOWED[torch.ops.aten.matmul.default](a, b)
    assert torch.equal(product, torch.matmul(a, b))
    node = product.grad_fn.next_functions[0][0]
    assert isinstance(node._raw_saved_mat2.data, KeptView)
    assert torch.equal(node._saved_mat2, b.reshape(6, 4, 7))


def test_what_was_written_to_since_is_kept_itself():
    x, weight = quantized(3, 4), torch.ones((), requires_grad=True)
    x.add_(1e-3)
    with kept_for_backward(Kept.CODES):
        out = x * weight
    out.sum().backward()
    assert weight.grad == x.sum()


def test_a_view_whose_signs_are_still_to_be_changed_is_kept_itself():
    x, weight = quantized(3, 2), torch.ones((), requires_grad=True)
    with kept_for_backward(Kept.CODES):
        seen = torch.view_as_complex(x).conj().imag  # in the memory of `x`
        out = seen * weight
    out.sum().backward()
    assert seen.is_neg() and weight.grad == -x[:, 1].sum()


def test_hooks_of_others_are_left_their_way():
    seen = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with kept_for_backward(Kept.CODES):
            assert not keeps_codes()
            quantized(3, 4) * torch.ones((), requires_grad=True)
    assert len(seen) == 1
    with torch.no_grad(), kept_for_backward(Kept.CODES):
        assert not keeps_codes()
    with kept_for_backward(Kept.TENSORS):
        assert not keeps_codes()


def test_checkpointed_activations_give_the_same_gradients():
    model, images = wide(True)
    expected = gradients(model, model, images)
    found = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False), images)
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_one_graph_still():
    model, images = wide(True, depth=1)
    expected = gradients(model, model, images)
    torch._dynamo.reset()
    found = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), images)
    torch._dynamo.reset()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_as_well(again: Callable[[nn.Module], nn.Module]):
    model, images = wide(True)
    twin = again(model)
    assert_same(gradients(twin, twin, images), gradients(model, model, images))
    assert twin.saves_memory


def test_accumulated_gradients_are_the_same_too():
    found = []
    for saving in (True, False):
        model, images = wide(saving, depth=2)
        for batch in (images, images.flip(0) * 0.5, images[:1]):
            model(batch).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_same(*found)


def under_ddp(rank: int, form: str) -> list[dict[str, Tensor | None]]:
    """Gradients of one of two processes, each with its own batch: with codes and without."""
    if form == "PyTorch":  # what the fixture has exchanged stays in its own process
        cpu._works = lambda: False
    found = []
    for saving in (True, False):
        model, images = wide(saving, depth=2)
        wrapped = DistributedDataParallel(model)
        wrapped(images * (1.0 + rank)).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


@pytest.mark.slow
def test_two_processes_under_ddp_get_the_same_gradients(tmp_path: Path, each_form: str):
    ours, theirs = on_two_ranks(partial(under_ddp, form=each_form), tmp_path)
    assert_same(*ours)
    assert_same(ours[0], theirs[0])
