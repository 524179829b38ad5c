"""`CheckpointInfo`: what `config.json` says of a saved model beyond the recipe, to build its graph again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from hf_qat.config.checks import refuse_unknown
from hf_qat.errors import ConfigError


class Stage(str, Enum):
    """How far a model has come; a string, as in `config.json`."""

    PREPARED = "prepared"  # it trains: float weights and fake quantizers
    CONVERTED = "converted"  # it is for inference: integer codes

    __str__ = str.__str__


#: What the values of each JSON type are called in messages.
_KINDS: dict[str, tuple[type, str]] = {
    "stage": (str, "a string"),
    "model_class": (str, "a string"),
    "num_labels": (int, "a whole number"),
    "inputs": (list, "a list"),
    "operations": (dict, "an object"),
    "fingerprint": (str, "a string"),
    "transformers_version": (str, "a string"),
    "torch_version": (str, "a string"),
    "labelled_calls": (dict, "an object"),
    "other_size": (list, "a list"),
}

#: Entries that are absent where they say nothing.
_OPTIONAL = ("labelled_calls", "other_size")


@dataclass(frozen=True)
class CheckpointInfo:
    """The entry `checkpoint` of a saved `quantization_config`.

    Attributes:
        stage: of the model.
        model_class: name of the class that was saved.
        num_labels: its number of labels; another number at loading means a new head.
        inputs: example inputs without their data, see `hf_qat.model.saved_config.describe_inputs`.
        operations: what was captured, see `hf_qat.graph.fingerprint`; `fingerprint` is its hash.
        transformers_version, torch_version: of the saving process.
        labelled_calls: per captured child, calls that labels make it receive in training, see
            `hf_qat.model.saved_config.describe_labelled_calls`; absent where there are none.
        other_size: example inputs with images of another size, as `inputs`; absent for a model of one size.
    """

    stage: Stage
    model_class: str
    num_labels: int
    inputs: list[Any]
    operations: dict[str, list[str]]
    fingerprint: str
    transformers_version: str
    torch_version: str
    labelled_calls: dict[str, list[Any]] = field(default_factory=dict)
    other_size: list[Any] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        data = {**asdict(self), "stage": self.stage.value}
        return {name: value for name, value in data.items() if value or name not in _OPTIONAL}

    @classmethod
    def from_dict(cls, data: object) -> CheckpointInfo:
        """The inverse of `to_dict`, for data that may come from anywhere.

        Raises:
            ConfigError: an entry is missing, unknown, or of another type.
        """
        where = "quantization_config['checkpoint']"
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{where} must be an object, not {data!r}: the config.json was not written by save_pretrained."
            )
        data = {"labelled_calls": {}, "other_size": [], **data}
        names = [entry.name for entry in fields(cls)]
        refuse_unknown(where, data, names)
        for name in names:
            kind, called = _KINDS[name]
            if not isinstance(data.get(name), kind) or isinstance(data[name], bool):
                raise ConfigError(f"{where}[{name!r}] must be {called}, not {data.get(name)!r}.")
        stages = [stage.value for stage in Stage]
        if data["stage"] not in stages:
            raise ConfigError(f"{where}['stage'] must be one of {', '.join(stages)}, not {data['stage']!r}.")
        for path, lines in data["operations"].items():
            if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
                raise ConfigError(f"{where}['operations'][{path!r}] must be a list of strings.")
        return cls(**{**data, "stage": Stage(data["stage"])})
