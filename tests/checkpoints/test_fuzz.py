"""Checkpoints with other bytes, headers and configs: each loads, or is refused by an error that says why.

All of them: `python -m pytest tests/checkpoints/test_fuzz.py`; without those that take long, a sample.
"""

from __future__ import annotations

import json
import random
import traceback
from pathlib import Path

import pytest
import torch

from hf_qat.checkpoints.load_weights import load_weights
from hf_qat.config.qat_config import QATConfig
from hf_qat.errors import HfQatError
from tests.checkpoints.damaged import RESNET, load, quantized
from tests.mutations import mutated_bytes, mutated_header, mutated_json


#: Tries for each seed.
TRIES = 100

slow = pytest.mark.slow


def mutate(directory: Path, draw: random.Random) -> str:
    """Change one file of a checkpoint, in place; says what was changed."""
    kind = draw.choice(["bytes", "header", "recipe", "config"])
    weights, config = directory / "model.safetensors", directory / "config.json"
    if kind == "bytes":
        weights.write_bytes(mutated_bytes(weights.read_bytes(), draw))
    elif kind == "header":
        weights.write_bytes(mutated_header(weights.read_bytes(), draw))
    elif kind == "recipe":
        data = json.loads(config.read_bytes())
        data["quantization_config"] = mutated_json(data["quantization_config"], draw)
        config.write_text(json.dumps(data))
    else:
        config.write_bytes(mutated_bytes(config.read_bytes(), draw))
    return kind


def is_ours(error: Exception) -> bool:
    """Whether it went through a line of `hf_qat`: what transformers refuses before it calls us is its own to word."""
    package = str(Path(load_weights.__code__.co_filename).parents[1])
    return any(frame.filename.startswith(package) for frame in traceback.extract_tb(error.__traceback__))


@pytest.mark.filterwarnings("ignore")  # what transformers says of odd configs
@pytest.mark.parametrize("stage", ["prepared", "converted"])
@pytest.mark.parametrize(("seed", "tries"), [(0, 6), *(pytest.param(seed, TRIES, marks=slow) for seed in range(1, 7))])
def test_from_pretrained_loads_finite_weights_or_says_what_is_wrong(
    seed: int, tries: int, stage: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    draw, pixels = random.Random(seed), RESNET.pixels(1)
    for _ in range(tries):
        for file in directories[stage].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        kind = mutate(tmp_path, draw)
        try:
            model = load(tmp_path)
        except HfQatError as error:
            assert str(error)
        except Exception as error:
            if kind not in ("recipe", "config") or is_ours(error):
                raise
        else:
            assert all(bool(torch.isfinite(p).all()) for p in model.state_dict().values() if p.is_floating_point())
            assert model(pixels).logits.shape == (1, 5)


@pytest.mark.parametrize(("seed", "tries"), [(0, 50), *(pytest.param(seed, 1000, marks=slow) for seed in range(1, 3))])
def test_load_weights_loads_finite_weights_or_loads_nothing(
    seed: int, tries: int, directories: dict[str, Path], tmp_path: Path
) -> None:
    draw, file = random.Random(seed), tmp_path / "model.safetensors"
    content = (directories["converted"] / "model.safetensors").read_bytes()
    model = quantized(QATConfig())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(tries):
        file.write_bytes(draw.choice([mutated_bytes, mutated_header])(content, draw))
        try:
            load_weights(model, file, verbose=False)
        except HfQatError as error:
            assert str(error)
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        else:
            state = model.state_dict()
            assert all(bool(torch.isfinite(value).all()) for value in state.values())
            model.load_state_dict(before)
