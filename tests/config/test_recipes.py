"""The recipes that come with the package: whole, usable, and from rows that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hf_qat import QATConfig, targets
from hf_qat.config.recipes import read_recipe, recipe_file, recipe_names
from hf_qat.errors import ConfigError


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_makes_a_config_and_training_arguments(name: str, tmp_path: Path):
    """Its numbers, by a parser of YAML, in the objects that are trained with; the rate is a share, by hand."""
    written = yaml.safe_load(recipe_file(name).read_text())
    args = TrainingArguments(str(tmp_path), **read_recipe(name).training_arguments(2e-3))
    assert args.learning_rate == pytest.approx(written["learning_rate_share"] * 0.002)
    assert (args.num_train_epochs, args.weight_decay) == (written["num_train_epochs"], written["weight_decay"])
    assert args.lr_scheduler_type == written["lr_scheduler_type"]
    assert QATConfig.from_recipe(name).target == written["target"] and written["target"] in targets()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_a_benchmark_and_results_that_are_there(name: str):
    comments = "".join(line for line in recipe_file(name).read_text().splitlines() if line.startswith("#"))
    files = re.findall(r"tests/[\w/]+\.\w+", comments)
    assert "Measured:" in comments and files and all((REPOSITORY / file).is_file() for file in files)


def test_a_change_wins_over_a_recipe():
    config = QATConfig.from_recipe("depthwise_w4a4.yaml", target="TDA4VM", freeze_bn_at=0.25)
    assert (config.target, config.freeze_bn_at) == ("TDA4VM", 0.25)


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match="no recipe 'resnet'.*depthwise_int8"):
        QATConfig.from_recipe("resnet")
