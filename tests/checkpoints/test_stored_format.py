"""How codes lie in a file, read by numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from hf_qat.checkpoints.stored_format import quantized_layers, stored_shape, stored_state
from hf_qat.config.qat_config import QATConfig
from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from tests.checkpoints.damaged import load, quantized


def test_codes_are_stored_flat_under_the_name_of_the_weight(directories: dict[str, Path]) -> None:
    stored = load_file(directories["converted"] / "model.safetensors")
    layers = quantized_layers(load(directories["converted"]))
    assert layers
    for path, layer in layers.items():
        flat = stored[f"{path}.weight"]
        assert (flat.dtype, flat.shape) == (np.int8, (1, layer.codes.numel()))
        np.testing.assert_array_equal(flat[0], layer.codes.numpy().flatten())


@pytest.mark.parametrize(("bits", "inputs", "outputs"), [(8, 6, 1), (8, 1, 1), (4, 6, 1), (4, 1, 1), (8, 1, 6)])
def test_no_weight_has_the_shape_under_which_its_codes_are_stored(bits: int, inputs: int, outputs: int) -> None:
    model = prepare_qat(nn.Linear(inputs, outputs), QATConfig(weights={"bits": bits}), torch.randn(2, inputs))
    layer = convert(calibrate(model, [torch.randn(4, inputs)]))
    assert stored_shape(layer) != (outputs, inputs)
    assert stored_state(model)["weight"].shape == stored_shape(layer)


def test_codes_of_four_bits_lie_two_in_a_byte_and_come_back(tmp_path: Path) -> None:
    model = quantized(QATConfig("w4a8"))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    narrow = {path: layer for path, layer in quantized_layers(model).items() if layer.weight_spec.bits == 4}
    assert narrow
    back = quantized_layers(load(tmp_path))
    for path, layer in narrow.items():
        packed = stored[f"{path}.weight"][0]
        codes = np.stack([packed & 15, packed >> 4], 1).flatten()[: layer.codes.numel()].astype(np.int8)
        np.testing.assert_array_equal(np.where(codes > 7, codes - 16, codes), layer.codes.numpy().flatten())
        assert torch.equal(back[path].codes, layer.codes)
