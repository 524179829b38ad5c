from __future__ import annotations

from dataclasses import fields

import pytest

from hf_qat.config.targets import find_target, targets
from hf_qat.tidl.devices import DEVICES, Fact, find_device
from hf_qat.tidl.runtime_options import runtime_options


#: Worked out from TI's documents by hand: (scale type, power of two, zero points, per channel, look-up tables).
EXPECTED = {
    "TDA4VM": (1, True, False, False, True),
    "AM62A": (4, False, True, True, False),
    "AM67A": (4, False, True, True, True),
    "AM68A": (4, False, True, True, True),
    "AM69A": (4, False, True, True, True),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_facts_are_those_of_the_documents(name):
    device = find_device(name)
    facts = (device.scale_type, device.power_of_two, device.asymmetric, device.per_channel, device.lut)
    assert tuple(fact.value for fact in facts) == EXPECTED[name]


def test_every_fact_names_its_source():
    for device in DEVICES:
        values = [getattr(device, field.name) for field in fields(device)]
        facts = [value for value in values if isinstance(value, Fact)] + list(device.warnings)
        assert len(facts) >= 12
        assert all(fact.source for fact in facts)


def test_models_are_trained_with_what_the_device_computes():
    assert {device.name for device in DEVICES} == {name for name in targets() if name.startswith(("TDA", "AM"))}
    for device in DEVICES:
        trained = find_target(device.name)
        assert find_target(device.soc).name == device.name or device.soc == device.name
        assert trained.activations.symmetric != device.asymmetric.value
        assert trained.weights.per_channel == device.per_channel.value
        assert trained.weights.power_of_two == trained.activations.power_of_two == device.power_of_two.value
        assert trained.one_sign_in_products != device.mixed_sign_matmul.value
        assert trained.weights.bits == trained.activations.bits == 8


def test_quantized_models_are_told_to_be_so_and_calibration_is_off():
    options = runtime_options(find_device("AM68A"), frames=7, ranges="qdq")
    assert options["advanced_options:prequantized_model"] == 1
    assert options["accuracy_level"] == 0
    assert options["advanced_options:quantization_scale_type"] == 4
    assert options["advanced_options:calibration_frames"] == 7
    assert "advanced_options:prequantized_model" not in runtime_options(find_device("TDA4VM"), 7, "clip")
