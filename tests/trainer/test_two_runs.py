from __future__ import annotations

from pathlib import Path

import pytest

from hf_qat.errors import InUseError
from hf_qat.files.only_writer import only_writer
from tests.training import trainer_of, vit


def test_a_training_does_not_begin_where_another_one_saves_and_leaves_it_alone(tmp_path: Path):
    trainer = trainer_of(vit(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with only_writer(tmp_path), pytest.raises(InUseError, match=str(tmp_path)):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
