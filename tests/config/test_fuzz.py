"""Configs that anybody may have written: each is a valid one, or refused with a `ConfigError`.

All of them: `python -m pytest tests/config/test_fuzz.py` prints nothing but that it passed; `CONFIGS` and `FILES` are
the numbers of tries.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hf_qat.config.checkpoint_info import CheckpointInfo
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import ConfigError
from hf_qat.model.saved_config import rebuild_inputs, rebuild_labelled_calls
from tests.mutations import ODD, mutated_bytes, mutated_json


CONFIGS, FILES = 1000, 500

TENSOR = {"tensor": [2, 3, 32, 32], "dtype": "float32"}

#: With a value for every key.
WHOLE: dict[str, Any] = {
    **QATConfig("AM68A", exclude=["classifier"], overrides={"*.conv": {"weights": {"bits": 4}}}).to_dict(),
    "weights": {"bits": 8, "per_channel": True, "observer": "minmax"},
    "activations": {"symmetric": False, "learned": False},
    "checkpoint": {
        "stage": "prepared",
        "model_class": "ResNetForImageClassification",
        "num_labels": 5,
        "inputs": [[], {"dict": {"pixel_values": TENSOR}}],
        "operations": {"resnet": ["embedder: conv2d", "pooler: mean"]},
        "fingerprint": "0" * 64,
        "transformers_version": "5.24.0",
        "torch_version": "2.13.0",
        "labelled_calls": {"decoder": [[True, [[[TENSOR], {"dict": {"x": TENSOR}}], [[TENSOR], {"dict": {}}]]]]},
    },
}


def use(data: Any) -> QATConfig:
    """Everything that is done with a config before a model is there."""
    config = QATConfig.from_dict(data)
    config.schemes_for("resnet.embedder.conv")
    assert config.excludes("") in (True, False)
    assert isinstance(repr(config), str)
    if config.checkpoint is not None:
        info = CheckpointInfo.from_dict(config.checkpoint)
        rebuild_inputs(info.inputs)
        rebuild_labelled_calls(info.labelled_calls)
    return config


def test_the_whole_config_is_valid():
    assert use(WHOLE).target == "AM68A"


def test_a_config_with_other_values_is_valid_or_refused_with_a_config_error():
    draw, valid = random.Random(0), 0
    for _ in range(CONFIGS):
        data = mutated_json(WHOLE, draw)
        try:
            config = use(data)
        except ConfigError as error:
            assert str(error) and len(str(error)) < 30_000
            continue
        valid += 1
        assert QATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert 0.02 * CONFIGS < valid < 0.9 * CONFIGS


@pytest.mark.parametrize("key", [*WHOLE, *(f"checkpoint.{key}" for key in WHOLE["checkpoint"])])
def test_every_key_takes_or_refuses_every_odd_value(key: str):
    for value in ODD:
        data = json.loads(json.dumps(WHOLE))
        holder = data["checkpoint"] if key.startswith("checkpoint.") else data
        holder[key.rpartition(".")[2]] = value
        try:
            use(data)
        except ConfigError as error:
            assert str(error)


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_what_is_no_config_at_all_is_refused(value: Any):
    try:
        QATConfig.from_dict(value)
    except ConfigError:
        return
    assert value in ({}, {"weights": {"bits": 4}})  # the others are defaults


def test_a_file_with_other_bytes_is_valid_or_refused_with_a_config_error(tmp_path: Path):
    draw, file = random.Random(1), tmp_path / "config.json"
    content = json.dumps({"model_type": "resnet", "quantization_config": WHOLE}).encode()
    for _ in range(FILES):
        file.write_bytes(mutated_bytes(content, draw))
        try:
            QATConfig.from_pretrained(file)
        except ConfigError as error:
            assert str(error)
