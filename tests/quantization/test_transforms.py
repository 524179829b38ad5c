"""What transforms functions is refused with what to do; in float, and where there is no derivative, it is right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_qat import QATConfig, calibrate, convert, fake_quant_disabled, prepare_qat
from hf_qat.errors import TransformError
from hf_qat.quantization.kernels import cpu
from tests.models import spread


#: Of PyTorch's own: it scripts formulas for forward mode, and has no batching rule for some operations.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:There is a performance drop")

OBSERVED = {"learned": False}
CONFIGS = {
    "learned": QATConfig("int8"),
    "observed": QATConfig("int8", weights=OBSERVED, activations={**OBSERVED, "observer": "moving_average"}),
    "codes kept": QATConfig("int8", save_memory=True),
}

Model = Callable[[Tensor], Tensor]


def batched_gradients(model: Model, x: Tensor) -> Tensor:
    """Gradients of the images for three vectors, in one backward pass."""
    x = x.clone().requires_grad_()
    out = model(x)
    vectors = torch.stack([torch.ones_like(out), out.detach(), -out.detach()])
    return torch.autograd.grad(out, x, vectors, is_grads_batched=True)[0]


def derivative_in_forward_mode(model: Model, x: Tensor) -> Tensor:
    """That of the outputs, along images of ones."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    return torch.zeros(()) if tangent is None else tangent


def derivative_without_graph(model: Model, x: Tensor) -> Tensor:
    """The same, where no graph is made for a backward pass."""
    with torch.no_grad():
        return derivative_in_forward_mode(model, x)


DERIVATIVES: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "is_grads_batched": batched_gradients,
    "vectorize": lambda model, x: torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, vectorize=True),
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "jacrev": lambda model, x: torch.func.jacrev(lambda x: model(x).sum(0))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "forward mode": derivative_in_forward_mode,
    "forward mode without graph": derivative_without_graph,
}
TRANSFORMS = {**DERIVATIVES, "vmap": lambda model, x: torch.func.vmap(lambda x: model(x[None])[0])(x)}


def original() -> nn.Module:
    """Convolution, batch norm, GELU, softmax."""
    parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.GELU()]
    return spread(nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 3), nn.Softmax(-1))).eval()


def calibrated(config: QATConfig, x: Tensor) -> nn.Module:
    """The prepared original, in evaluation."""
    return calibrate(prepare_qat(original(), config, x), [x], bias_correction=False)


@pytest.fixture(params=[True, False], ids=["Numba", "PyTorch"])
def loops(request, monkeypatch) -> None:
    works = cpu._works()
    monkeypatch.setattr(cpu, "_works", lambda: works and request.param)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_are_refused_with_quantizers_and_are_the_float_models_without(config):
    x, float_model = torch.randn(4, 3, 6, 6), original()
    model = calibrated(config, x)
    for transform in TRANSFORMS.values():
        for training in (True, False):
            with pytest.raises(TransformError, match=r"call backward\(\).*fake_quant_disabled\(model\)"):
                transform(copy.deepcopy(model).train(training), x)
        with fake_quant_disabled(model):
            found = transform(model, x)
        torch.testing.assert_close(found, transform(float_model, x), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("loops")
def test_a_converted_model_is_vectorized_and_has_no_derivatives_but_by_backward():
    x = torch.randn(4, 3, 6, 6)
    model = convert(calibrated(QATConfig("int8"), x))
    torch.testing.assert_close(TRANSFORMS["vmap"](model, x), model(x), rtol=0.0, atol=1e-6)
    for transform in DERIVATIVES.values():
        with pytest.raises(TransformError, match=r"call backward\(\)"):
            transform(model, x)


def test_gradients_of_weights_by_functional_call_are_refused():
    x = torch.randn(4, 3, 6, 6)
    model = calibrated(QATConfig("int8"), x)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    with pytest.raises(TransformError, match="torch.func"):
        torch.func.grad(loss)(dict(model.named_parameters()))
