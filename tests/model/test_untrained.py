from pathlib import Path

import torch
from torch import nn
from transformers import ViTForImageClassification

from hf_qat.model.untrained import (
    batch_statistics,
    has_batch_norms,
    is_untrained,
    new_parameters,
    untrained_batch_norms,
)
from tests.models import LABELS, resnet, vit


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(3)


def test_a_batch_norm_is_untrained_until_its_first_batch():
    model = nn.Sequential(norm(), nn.BatchNorm1d(4), nn.GroupNorm(1, 3))
    model[1](torch.randn(8, 4))
    assert untrained_batch_norms(model) == [model[0]]


def test_statistics_without_a_count_of_batches_are_trained_ones():
    """As those of a checkpoint that was converted from another library."""
    converted = norm()
    converted.running_mean.fill_(0.1)
    assert not untrained_batch_norms(converted)


def test_a_batch_norm_without_statistics_has_none_to_freeze():
    bare = nn.BatchNorm2d(3, track_running_stats=False)
    assert not untrained_batch_norms(bare) and not has_batch_norms(bare)


def test_batch_statistics_are_used_and_the_running_ones_left_alone():
    bn, x = norm().eval(), 3 * torch.randn(4, 3, 5, 5) + 1
    before = {name: value.clone() for name, value in bn.state_dict().items()}
    with batch_statistics([bn]):
        inside = bn(x)
    torch.testing.assert_close(inside.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    assert not bn.training and all(torch.equal(before[name], value) for name, value in bn.state_dict().items())


def test_a_head_that_the_checkpoint_does_not_have_is_new(tmp_path: Path):
    resnet().save_pretrained(tmp_path)
    cls = type(resnet())
    assert new_parameters(cls.from_pretrained(tmp_path)) == []
    other = cls.from_pretrained(tmp_path, num_labels=LABELS + 1, ignore_mismatched_sizes=True)
    assert new_parameters(other) == ["classifier.1.weight", "classifier.1.bias"]


def test_a_net_is_untrained_until_its_norms_have_moved(tmp_path: Path):
    model = ViTForImageClassification(vit().config)
    assert is_untrained(model) and not is_untrained(vit()) and not is_untrained(nn.Linear(2, 2))
    model(torch.randn(2, 3, 32, 32)).logits.square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-4).step()
    assert not is_untrained(model)
    model.save_pretrained(tmp_path)
    assert not is_untrained(ViTForImageClassification.from_pretrained(tmp_path))


def test_nothing_is_known_to_be_new_of_a_model_that_no_checkpoint_was_read_for():
    assert new_parameters(vit()) == []
