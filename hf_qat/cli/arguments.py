"""The arguments of the commands that read a model and images, as dataclasses for `HfArgumentParser`.

Named as those of transformers' example scripts. A script of one's own can parse them, too:

    parser = HfArgumentParser((QATArguments, TrainingArguments))
    qat, args = parser.parse_args_into_dataclasses()
    trainer = QATTrainer(model, args, qat_config=qat.to_config(), train_dataset=train)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_qat.config.targets import targets
from hf_qat.errors import ConfigError


if TYPE_CHECKING:
    from hf_qat.config.qat_config import QATConfig


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "A folder, or the model's name on the Hub: user/model."})
    revision: str = field(default="main", metadata={"help": "On the Hub: a branch, a tag or a commit."})


@dataclass
class DataArguments:
    """Which images, and what is asked of them."""

    dataset_name: str = field(
        metadata={
            "help": "A folder of images (one folder a class, or with a metadata.jsonl), a JSONL file with a path "
            "under `image` in each line (and under `label` or `depth`, where that is a picture; objects are "
            '{"bbox": [[x, y, width, height]], "category": ["cat"]}), or a data set\'s name on the Hub.'
        }
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Of a data set on the Hub with several."})
    task: str = field(
        default="image-classification",
        metadata={"help": "image-classification, semantic-segmentation, object-detection or depth-estimation."},
    )
    image_column_name: str = field(default="image", metadata={"help": "The column with the images."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "The column with what is to be learned; label, objects or depth if left out."}
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the images to evaluate on where there is no split for it."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many images only, to try things."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})


@dataclass
class QATArguments:
    """The recipe, as far as one sets it on a command line; `QATConfig` explains each."""

    target: str = field(default="int8", metadata={"help": f"What will run the model: {', '.join(targets())}."})
    weight_bits: int | None = field(default=None, metadata={"help": "Bits of the weights, 2 to 8; the target's own."})
    activation_bits: int | None = field(default=None, metadata={"help": "Bits of what flows between layers."})
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "Parts that stay in float: globs on module paths."}
    )
    calibration_batches: int = field(default=32, metadata={"help": "Batches to find the first ranges with."})
    calibration_effort: str = field(
        default="fast", metadata={"help": "best: learn rounding, scales and biases from the images, in minutes."}
    )
    freeze_bn_at: float | None = field(
        default=None, metadata={"help": "Share of training after which batch norm is frozen."}
    )
    freeze_ranges_at: float = field(default=0.9, metadata={"help": "Share of training after which no scale changes."})
    float_learning_rate: float | None = field(
        default=None, metadata={"help": "What the float model was trained with, for a recipe's learning_rate_share."}
    )
    learning_rate_share: float | None = field(
        default=None, metadata={"help": "Take this share of float_learning_rate in place of learning_rate."}
    )

    def learning_rate(self, otherwise: float) -> float:
        """The share of the float model's learning rate; or `otherwise`, if neither is given.

        Raises:
            ConfigError: one of the two is given without the other.
        """
        if self.float_learning_rate is None and self.learning_rate_share is None:
            return otherwise
        if self.float_learning_rate is None or self.learning_rate_share is None:
            raise ConfigError(
                "learning_rate_share (of a recipe) and float_learning_rate belong together: give the rate that the "
                "float model was trained with, e.g. --float_learning_rate 1e-3, and the share of it to train with."
            )
        return self.learning_rate_share * self.float_learning_rate

    def to_config(self) -> QATConfig:
        """The recipe.

        Raises:
            ConfigError: an unknown target, or a value that is impossible.
        """
        from hf_qat.config.qat_config import QATConfig  # loads PyTorch, for which --help need not wait

        return QATConfig(
            self.target,
            weights=None if self.weight_bits is None else {"bits": self.weight_bits},
            activations=None if self.activation_bits is None else {"bits": self.activation_bits},
            exclude=self.exclude,
            calibration_batches=self.calibration_batches,
            calibration_effort=self.calibration_effort,
            freeze_bn_at=self.freeze_bn_at,
            freeze_ranges_at=self.freeze_ranges_at,
        )
