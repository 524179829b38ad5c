"""Recipes that were measured, as YAML: a `QATConfig`, and how to train by it.

A recipe does not know the model, so it says the learning rate as a share of the one that trained the float model.
Each file names the row of a benchmark that it comes from, and holds options of `hf-qat train`:

    hf-qat train --config depthwise_w4a4 --float_learning_rate 5e-3 ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_qat.errors import ConfigError


#: Keys of a file that are arguments of transformers' `TrainingArguments`; the others are of `QATConfig`.
TRAINING = ("num_train_epochs", "lr_scheduler_type", "weight_decay")

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What was measured to work for a kind of network at a bit width.

    Attributes:
        config: arguments of `QATConfig`.
        learning_rate_share: learning rate of AdamW, as a share of that of the float training.
        training: arguments of `TrainingArguments`.
    """

    config: Mapping[str, Any]
    learning_rate_share: float
    training: Mapping[str, Any]

    def training_arguments(self, float_learning_rate: float) -> dict[str, Any]:
        """Keyword arguments of `TrainingArguments`.

        Args:
            float_learning_rate: what the float model was trained with, at its highest.

        Examples:
            >>> read_recipe("depthwise_w4a4").training_arguments(5e-3)["learning_rate"]
            0.0005
        """
        return {**self.training, "learning_rate": self.learning_rate_share * float_learning_rate}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    known = recipe_names()
    if name.removesuffix(".yaml") not in known:
        raise ConfigError(f"there is no recipe {name!r}. Known recipes: {', '.join(known)}.")
    return FOLDER / f"{name.removesuffix('.yaml')}.yaml"


def read_recipe(name: str) -> Recipe:
    """A recipe that comes with the package, by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    values = yaml.safe_load(recipe_file(name).read_text(encoding="utf-8"))
    share = values.pop("learning_rate_share")
    training = {key: values.pop(key) for key in TRAINING}
    return Recipe(values, share, training)
