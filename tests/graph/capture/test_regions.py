import copy

import torch
from torch import Tensor, nn

from hf_qat.graph.capture.capture import capture
from hf_qat.graph.nodes import SETTINGS


class Probe(nn.Module):
    """A frozen body under `no_grad`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(x)
        return self.head(features)


class Precise(nn.Module):
    """A product that is computed in float32 whatever autocast says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            return self.second(x.float())


def test_what_runs_without_gradients_gets_none():
    model = Probe()
    capture(model, torch.randn(2, 4))
    model(torch.randn(5, 4)).sum().backward()
    assert model.body.weight.grad is None and model.head.weight.grad is not None
    assert torch.is_grad_enabled()


def test_precision_inside_a_region_is_that_of_the_models_own_code():
    float_model = Precise()
    model, x = copy.deepcopy(float_model), torch.randn(5, 4)
    module = capture(model, torch.randn(2, 4))[""]
    assert any(node.target in SETTINGS for node in module.graph.nodes)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = model(x), float_model(x)
    assert result.dtype == expected.dtype == torch.float32
    assert torch.equal(result, expected)
