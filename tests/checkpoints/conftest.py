from __future__ import annotations

from pathlib import Path

import pytest

from hf_qat.model.calibration import calibrate
from hf_qat.model.conversion import convert
from hf_qat.model.prepare import prepare_qat
from tests.checkpoints.damaged import RESNET


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An affine model as a training and as a quantized checkpoint."""
    model = prepare_qat(RESNET.make().eval(), None, {"pixel_values": RESNET.pixels(2)})
    calibrate(model, [RESNET.pixels(4, 1)])
    paths = {stage: tmp_path_factory.mktemp(stage) for stage in ("prepared", "converted")}
    model.save_pretrained(paths["prepared"])
    convert(model).save_pretrained(paths["converted"])
    return paths
