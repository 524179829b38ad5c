"""Arguments of the commands, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_qat import QATConfig
from hf_qat.cli.arguments import QATArguments
from hf_qat.cli.parsing import parse, parser_of
from hf_qat.config.recipes import recipe_names
from hf_qat.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_the_options_of_a_recipe_are_options_of_train(name: str, tmp_path: Path):
    """That the command takes each of them, loses none, and that what is typed wins."""
    typed = [
        "--config",
        name,
        "--float_learning_rate",
        "0.01",
        "--output_dir",
        str(tmp_path),
        "--num_train_epochs",
        "7",
    ]
    qat, args, _ = parse(parser_of("train", "", QATArguments, TrainingArguments), typed)
    assert args.num_train_epochs == 7 and args.lr_scheduler_type == "cosine"
    assert qat.learning_rate(5e-5) == pytest.approx(qat.learning_rate_share * 0.01)
    assert qat.to_config() == QATConfig.from_recipe(name)


def test_the_learning_rate_is_a_share_of_the_float_one_or_what_was_given():
    assert QATArguments(float_learning_rate=2e-3, learning_rate_share=0.05).learning_rate(9.0) == pytest.approx(1e-4)
    assert QATArguments().learning_rate(9.0) == 9.0


@pytest.mark.parametrize("half", [{"float_learning_rate": 1e-3}, {"learning_rate_share": 0.1}], ids=str)
def test_one_of_the_two_alone_is_refused(half: dict[str, float]):
    with pytest.raises(ConfigError, match="belong together"):
        QATArguments(**half).learning_rate(5e-5)
