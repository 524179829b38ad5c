from importlib.util import find_spec

import pytest

from hf_qat import QATConfig, prepare_qat
from hf_qat.errors import CaptureError
from hf_qat.quantization.quantizer import fake_quantizers
from tests.coverage.models import COMPLETE, REFUSALS, REFUSED, SMALL, covered_classes, mapped_classes


@pytest.mark.parametrize("task", COMPLETE)
def test_every_class_of_the_mapping_is_in_the_table_or_refused_with_a_reason(task):
    names = mapped_classes(task)
    missing = [name for name in names if name not in covered_classes() and name not in REFUSED]
    assert not missing
    assert len(names) > 5


@pytest.mark.parametrize("task", SMALL)
def test_every_class_of_a_small_mapping_is_in_the_table(task):
    names = mapped_classes(task)
    assert names and not [name for name in names if name not in covered_classes()]


def test_the_table_has_more_than_the_180_classes_that_it_promises():
    assert len(covered_classes()) >= 200


def test_nothing_is_both_covered_and_refused():
    assert not covered_classes() & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSALS)
def test_a_model_without_pixels_is_refused_in_one_sentence_and_left_as_it_was(name):
    make, inputs = REFUSALS[name]
    model = make()
    with pytest.raises(CaptureError, match="example_inputs"):
        prepare_qat(model, QATConfig(), inputs())
    assert not fake_quantizers(model)
    assert not hasattr(model, "_hf_qat_state")


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_a_timm_model_is_captured_as_a_whole():
    import torch
    import transformers

    config = transformers.TimmWrapperConfig(architecture="resnet18", num_labels=5)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 64, 64)
    expected = model(pixels).logits
    prepare_qat(model, QATConfig(), {"pixel_values": pixels})
    assert fake_quantizers(model)
    assert model(pixels).logits.shape == expected.shape
