import copy

import pytest
import torch
from torch import nn

from hf_qat.quantization.live_norm import is_live, normalise_live


@pytest.mark.parametrize("momentum", [0.1, 0.7, None], ids=["usual", "fast", "average of all"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_it_normalises_and_remembers_as_pytorch_does(momentum, affine):
    expected = nn.BatchNorm2d(3, momentum=momentum, affine=affine)
    norm = copy.deepcopy(expected)
    for seed in range(3):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(normalise_live(norm, x), expected(x))
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)
    assert norm.num_batches_tracked == expected.num_batches_tracked == 3


class Activating(nn.BatchNorm2d):
    """As timm's: the class's own forward does more than normalise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def test_what_else_a_class_does_is_left_to_the_graph():
    x = torch.randn(8, 3, 5, 5)
    assert torch.equal(normalise_live(Activating(3), x), nn.BatchNorm2d(3)(x))


def test_a_norm_is_live_in_training_alone_and_other_modules_never_are():
    norm = nn.BatchNorm2d(3)
    assert is_live(norm) and not is_live(norm.eval())
    assert not is_live(None) and not is_live(nn.LayerNorm(3))
