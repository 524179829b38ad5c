from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_qat.quantization.packing import code_dtype, pack_nibbles, unpack_nibbles
from hf_qat.quantization.spec import QuantizerSpec


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_the_dtype_of_codes_holds_them_all_and_is_the_smallest(bits, signed):
    spec = QuantizerSpec(bits=bits, signed=signed)
    limits = torch.iinfo(code_dtype(spec))
    assert limits.min <= spec.qmin and spec.qmax <= limits.max
    assert limits.bits == (8 if bits <= 8 else 16)


def test_two_codes_lie_in_a_byte_the_earlier_one_in_its_lower_half():
    packed = pack_nibbles(torch.tensor([1, -1, -8, 7, 3], dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0xF1, 0x78, 0x03]  # two's complement: -1 is F, -8 is 8


@given(st.lists(st.integers(-8, 7), max_size=33))
def test_codes_come_back_from_their_bytes_as_numpy_unpacks_them(codes: list[int]):
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int8)).numpy()
    halves = np.stack([packed << 4, packed & 0xF0], 1).reshape(-1).view(np.int8) >> 4  # with their signs
    assert halves[: len(codes)].tolist() == codes
    assert unpack_nibbles(torch.from_numpy(packed), len(codes)).tolist() == codes
