"""Arguments of the commands, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

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


def test_a_file_means_what_it_means_to_transformers(tmp_path: Path):
    """Null, mappings, lists, and `no`, which YAML reads as false; against `HfArgumentParser.parse_yaml_file`."""
    text = """
        output_dir: out
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr_rate: 0.1}
        accelerator_config: {even_batches: false}
        resume_from_checkpoint: null
        label_names: [labels]
        fp16: false
        exclude: []
    """
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(text)))
    (_, expected) = HfArgumentParser((QATArguments, TrainingArguments)).parse_yaml_file(str(file))
    file.write_text(file.read_text() + "save_strategy: no\n")
    qat, args, _ = parse(parser_of("train", "", QATArguments, TrainingArguments), ["--config", str(file)])
    assert args.save_strategy == "no" and expected.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    args.save_strategy = expected.save_strategy
    assert args.to_dict() == expected.to_dict() and qat == QATArguments()


def test_an_option_that_is_not_known_is_named(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("lerning_rate: 1")
    with pytest.raises(ConfigError, match=r"unknown here: --lerning-rate=1. `hf-qat train --help`"):
        parse(parser_of("train", "", QATArguments, TrainingArguments), ["--config", str(file), "--output_dir", "out"])
