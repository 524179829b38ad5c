from __future__ import annotations

import dataclasses

import pytest

from hf_qat.quantization.spec import QuantizerSpec


#: Fields → lowest and highest code, worked out by hand.
RANGES = [
    ({}, -128, 127),
    ({"narrow_range": True}, -127, 127),
    ({"signed": False, "symmetric": False}, 0, 255),
    ({"signed": False}, 0, 255),
    ({"non_negative": True}, 0, 127),
    ({"non_negative": True, "symmetric": False}, -128, 127),
    ({"bits": 4}, -8, 7),
    ({"bits": 4, "narrow_range": True}, -7, 7),
    ({"bits": 4, "signed": False}, 0, 15),
    ({"bits": 2, "narrow_range": True}, -1, 1),
    ({"bits": 16}, -32768, 32767),
    ({"bits": 16, "signed": False}, 0, 65535),
]


@pytest.mark.parametrize(("fields", "low", "high"), RANGES, ids=[str(fields) for fields, _, _ in RANGES])
def test_the_codes_of_a_spec_are_those_worked_out_by_hand(fields, low, high):
    spec = QuantizerSpec(**fields)
    assert (spec.qmin, spec.qmax) == (low, high)


def test_a_spec_cannot_be_changed_once_it_flows_between_rooms():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizerSpec().bits = 4  # type: ignore[misc]
