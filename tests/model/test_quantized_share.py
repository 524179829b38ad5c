import pytest
import torch
from torch import Tensor, nn

from hf_qat import QATConfig, prepare_qat
from hf_qat.model.quantized_share import float_layers, num_quantized_layers


class Weights(nn.Module):
    """Control flow around as many weights that are no layer's own as it is told to have."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Weight(size) for size in sizes])
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.head(x)


class Weight(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(size, 2)), nn.Parameter(torch.randn(2, size))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(nn.functional.linear(x, self.up), self.down)
        return x if x.sum() > 0 else -x


def test_a_small_share_is_warned_of_with_the_largest_layers(caplog):
    with caplog.at_level("WARNING"):
        model = prepare_qat(Weights((2, 16, 4, 8)), QATConfig(), torch.randn(2, 2))
    assert [layer.path for layer in float_layers(model)] == ["parts.1", "parts.3", "parts.2", "parts.0"]
    assert num_quantized_layers(model) == 1
    warned = [r.getMessage() for r in caplog.records if r.name == "hf_qat.model.quantized_share"]
    assert len(warned) == 1 and "only 1 of the 5 layers that run" in warned[0]
    assert "parts.1" in warned[0] and "parts.2" in warned[0] and "parts.0" not in warned[0]


@pytest.mark.parametrize("exclude", [[], ["parts.*"]])
def test_what_is_quantized_or_excluded_is_not(exclude, caplog):
    sizes = (4,) if exclude else ()
    with caplog.at_level("WARNING"):
        model = prepare_qat(Weights(sizes), QATConfig(exclude=exclude), torch.randn(2, 2))
    assert not [r for r in caplog.records if r.name == "hf_qat.model.quantized_share"]
    assert float_layers(model) == [] and num_quantized_layers(model) == 1
