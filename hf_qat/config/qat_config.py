"""`QATConfig`: the whole recipe of a quantization-aware training as plain data, checked when it is made.

It is a transformers quantization config, so it travels inside a model's `config.json` as `quantization_config`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, overload

from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_qat.config.checkpoint_info import CheckpointInfo
from hf_qat.config.checks import (
    QUANT_METHOD,
    Overrides,
    SchemeChanges,
    check_origin,
    count,
    flag,
    globs_on_paths,
    module_changes,
    named_values,
    number,
    one_of,
    positive,
    refuse_unknown,
    scheme_changes,
)
from hf_qat.config.mixed_precision import Measured, merged, propose
from hf_qat.config.recipes import read_recipe
from hf_qat.config.targets import Restrictions, Target, TensorScheme, check_schemes, did_you_mean, find_target
from hf_qat.errors import ConfigError
from hf_qat.version import __version__


#: How much time calibration may take.
EFFORTS = ("fast", "best")

#: Options that files of earlier versions do not have → what they then are; such files stay as they were.
LATER_OPTIONS = {"save_memory": False, "calibration_effort": "fast"}


class QATConfig(QuantizationConfigMixin):
    """What to quantize, how finely, and when in training each thing happens.

    Quantizing replaces each number by a small integer (its *code*) times a *scale*. The defaults are the recipe that
    kept most accuracy in our measurements; most users only choose `target`.

    Args:
        target: what will run the model: one of `hf_qat.targets()` or an alias, in upper or lower case. It sets the
            schemes of weights and activations, which `weights`, `activations` and `overrides` then change.
        weights: changes to the scheme of all weights, e.g. `{"bits": 4}`. Keys:
            `bits` (2 to 8, or 16): width of a code; each bit less halves the number of steps and about doubles the
            error. `per_channel`: one scale for each output channel instead of one for the tensor; more accurate, where
            the chip can do it. `power_of_two`: scales are powers of two, for chips that shift instead of multiplying.
            `learned`: scales are trained together with the weights. `observer`: how calibration chooses the first
            range: `"minmax"` keeps the extremes, `"percentile"` drops outliers, `"mse"` takes the range with the least
            squared error; `"moving_average"`, without `learned`, also follows the data during training. `symmetric`:
            zero is the middle of the codes; always true of weights.
        activations: the same for what flows between layers. Here `symmetric` may be false: codes are then unsigned and
            a *zero point* shifts them, which uses all of them on lopsided data; and `per_channel` is never true.
        exclude: glob or globs on dotted module paths, e.g. `"classifier"` or `["*.attention.*"]`; what they match, and
            all inside it, stays in float. `*` also matches dots; upper and lower case differ.
        overrides: other schemes for some modules: `{glob: {"weights": {...}, "activations": {...}}}`, with the same
            globs and keys as above. Where several globs match a module, the later one wins. `bits` named here also
            hold in the first and the last layers and before layer norms, which otherwise keep the 8 bits that 4-bit
            targets have for them.
        layer_restrictions: quantize as the target's layers can compute: TI's devices take no zero point in pooling,
            resizing, slices, products and others, although their schemes have one. `False` leaves a zero point there,
            which the device may ignore. At 4 bits, layer norms read activations of 8. Models of earlier versions were
            trained without restrictions, and stay so when they are loaded.
        symmetric_input: of TI's restrictions, the one on what enters the model; TI's own training leaves it out.
        freeze_bn_at: fraction of training, 0 to 1, after which batch norm stops following the data and becomes a part
            of the convolution, as it is on the chip. `None`: 0 (from the first step) if the scales of activations are
            learned, else 0.5. Where batch norm has no statistics yet, or the head is new, 0 is taken as
            `freeze_ranges_at`.
        freeze_ranges_at: fraction of training after which no scale changes any more, so that the weights settle to the
            very numbers that will be exported; not before `freeze_bn_at`.
        calibration_batches: batches to look at for the first ranges, before the first training step.
        calibration_effort: `"fast"`, seconds; or `"best"`, minutes: channels evened out between layers, and rounding
            learned from the batches; worth it at 4 bits.
        bias_correction: after calibration, shift biases so that the mean output of each layer is that of the float
            model.
        distillation_weight: 0 to 1; where a teacher (usually the float model) is given, this share of the loss is the
            distance to its predictions, and the rest is the task's own loss.
        distillation_temperature: above 1 softens both predictions before comparing, so that the teacher's second and
            third guesses count too.
        scale_lr_multiplier: learning rate of learned scales, relative to that of the weights.
        sync_batch_norm: while batch norm follows the data, take the statistics over the batches of all processes of a
            distributed training, not of each alone: for small batches per GPU.
        save_memory: in training, keep quantized activations as codes until the backward pass, a byte each, and of what
            is quantized another byte each: half of the memory, for a little time. Weights get the same
            gradients to the last bit, learned scales nearly the same.
        quant_method: always `"hf_qat"`; transformers finds the class by it.
        hf_qat_version: the version that wrote a saved config; `to_dict` puts it there.
        checkpoint: what `save_pretrained` adds to rebuild the model, a `CheckpointInfo` as a dict; no part of the
            recipe, so configs that differ only in it are equal.

    Attributes are named as the arguments and hold what was resolved: the proper name of the target, the changes as
    plain dicts, `freeze_bn_at` as a number.

    Raises:
        ConfigError: an unknown target or key (also inside the dicts), or a value or mix that is impossible.

    Examples:
        >>> config = QATConfig("TDA4VM", exclude="classifier", overrides={"*.layer.0.*": {"weights": {"bits": 4}}})
        >>> config.activation_scheme.power_of_two, config.schemes_for("encoder.layer.0.conv")[0].bits
        (True, 4)
    """

    quant_method: str  # type: ignore[assignment]

    def __init__(
        self,
        /,
        target: str = "int8",
        *,
        weights: SchemeChanges | None = None,
        activations: SchemeChanges | None = None,
        exclude: str | Sequence[str] = (),
        overrides: Overrides | None = None,
        layer_restrictions: bool | None = None,
        symmetric_input: bool = True,
        freeze_bn_at: float | None = None,
        freeze_ranges_at: float = 0.9,
        calibration_batches: int = 32,
        calibration_effort: str = "fast",
        bias_correction: bool = True,
        distillation_weight: float = 0.5,
        distillation_temperature: float = 2.0,
        scale_lr_multiplier: float = 10.0,
        sync_batch_norm: bool = False,
        save_memory: bool = False,
        quant_method: str = QUANT_METHOD,
        hf_qat_version: str | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        check_origin(quant_method, hf_qat_version)
        # What is set here is what `to_dict` writes: plain data, nothing derived beside it.
        self.target = find_target(target).name
        self.weights = scheme_changes("weights", weights)
        self.activations = scheme_changes("activations", activations)
        self.exclude = globs_on_paths("exclude", [exclude] if isinstance(exclude, str) else exclude)
        self.overrides = module_changes(overrides)
        # A dict that `to_dict` wrote has a version; without this entry it is from before there were restrictions.
        restricted = hf_qat_version is None if layer_restrictions is None else layer_restrictions
        self.layer_restrictions = flag("layer_restrictions", restricted)
        self.symmetric_input = flag("symmetric_input", symmetric_input)
        self.freeze_ranges_at = number("freeze_ranges_at", freeze_ranges_at, 0, 1)
        early = 0.0 if self.activation_scheme.learned else min(0.5, self.freeze_ranges_at)
        self.freeze_bn_at = early if freeze_bn_at is None else number("freeze_bn_at", freeze_bn_at, 0, 1)
        self.calibration_batches = count("calibration_batches", calibration_batches)
        self.calibration_effort = one_of("calibration_effort", calibration_effort, EFFORTS)
        self.bias_correction = flag("bias_correction", bias_correction)
        self.distillation_weight = number("distillation_weight", distillation_weight, 0, 1)
        self.distillation_temperature = positive("distillation_temperature", distillation_temperature)
        self.scale_lr_multiplier = positive("scale_lr_multiplier", scale_lr_multiplier)
        self.sync_batch_norm = flag("sync_batch_norm", sync_batch_norm)
        self.save_memory = flag("save_memory", save_memory)
        self.quant_method = quant_method
        self.checkpoint = None if checkpoint is None else CheckpointInfo.from_dict(checkpoint).to_dict()
        refuse_unknown("QATConfig", unknown, vars(self), hf_qat_version)
        self._check_mixes()

    def _check_mixes(self) -> None:
        if self.freeze_bn_at > self.freeze_ranges_at:
            raise ConfigError(
                f"freeze_bn_at={self.freeze_bn_at} comes after freeze_ranges_at={self.freeze_ranges_at}: what a live "
                "batch norm lets through would leave the frozen ranges. Freeze batch norm first."
            )
        check_schemes("the config", self.weight_scheme, self.activation_scheme)
        for glob, changes in self.overrides.items():
            check_schemes(f"overrides[{glob!r}]", *_apply(changes, self.weight_scheme, self.activation_scheme))

    @property
    def target_spec(self) -> Target:
        """The row of the table of targets, with the restrictions that hold."""
        row = find_target(self.target)
        if not self.layer_restrictions:
            return replace(row, restrictions=Restrictions())
        if not self.symmetric_input:
            return replace(row, restrictions=replace(row.restrictions, symmetric_input=False))
        return row

    @property
    def weight_scheme(self) -> TensorScheme:
        """The scheme of weights outside `overrides`."""
        return replace(self.target_spec.weights, **self.weights)

    @property
    def activation_scheme(self) -> TensorScheme:
        """The scheme of activations outside `overrides`."""
        return replace(self.target_spec.activations, **self.activations)

    def schemes_for(self, path: str) -> tuple[TensorScheme, TensorScheme]:
        """The schemes of the weights and of the activations of one module, with all overrides applied in order.

        Raises:
            ConfigError: the overrides that match `path` are each possible, but not together.
        """
        schemes = _apply(self.overrides_for(path), self.weight_scheme, self.activation_scheme)
        check_schemes(f"module {path!r}", *schemes)
        return schemes

    def overrides_for(self, path: str) -> dict[str, dict[str, Any]]:
        """What `overrides` change for one module, in order: `{"weights": {...}, "activations": {...}}`."""
        found: dict[str, dict[str, Any]] = {"weights": {}, "activations": {}}
        for glob, changes in self.overrides.items():
            if _matches(glob, path):
                for kind, values in changes.items():
                    found[kind] |= values
        return found

    def excludes(self, path: str) -> bool:
        """Whether a module stays float: a glob of `exclude` matches its path or a parent's."""
        return any(_matches(glob, path) for glob in self.exclude)

    def check_globs(self, paths: Iterable[str]) -> None:
        """Refuse globs that match nothing, and overrides that contradict each other, before any time is spent.

        Args:
            paths: the dotted paths of all modules of the model.

        Raises:
            ConfigError: with the glob and the nearest path.
        """
        paths = list(paths)
        for where in ("exclude", "overrides"):
            for glob in getattr(self, where):
                if not any(_matches(glob, path) for path in paths):
                    raise ConfigError(
                        f"{where}: {glob!r} matches no module of the model.{did_you_mean(glob, paths, cutoff=0)} "
                        "`model.named_modules()` lists all paths."
                    )
        for path in paths:
            self.schemes_for(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal config.

        `overrides` becomes a list of pairs: its order counts, and transformers sorts the keys of every dict it writes.
        """
        data = json.loads(json.dumps(vars(self)))
        data["overrides"] = [list(item) for item in data["overrides"].items()]
        if data["checkpoint"] is None:
            del data["checkpoint"]
        if find_target(self.target).restrictions == Restrictions() or not self.layer_restrictions:
            del data["layer_restrictions"], data["symmetric_input"]  # as files were before there were restrictions
        elif self.symmetric_input:
            del data["symmetric_input"]
        for name, usual in LATER_OPTIONS.items():
            if data[name] == usual:
                del data[name]
        return {**data, "hf_qat_version": __version__}

    def with_checkpoint(self, checkpoint: Mapping[str, Any] | None) -> QATConfig:
        """The same recipe with another entry `checkpoint`; with `None`, the recipe alone."""
        return type(self)(**{**vars(self), "checkpoint": checkpoint})

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> QATConfig:
        """The config of a recipe that comes with the package; `hf_qat.config.recipes` says how to train by it.

        Args:
            name: of a recipe, e.g. `"depthwise_w4a4"`.
            changes: arguments of `QATConfig` that replace those of the recipe, e.g. `target="AM68A"`.

        Raises:
            ConfigError: there is no such recipe, or as the constructor.

        Examples:
            >>> QATConfig.from_recipe("cnn_int8", target="TDA4VM").target
            'TDA4VM'
        """
        return cls(**{**read_recipe(name).config, **changes})

    @classmethod
    def from_analysis(cls, report: Measured, budget: Mapping[str, float]) -> QATConfig:
        """The recipe that a model was analyzed with, with more bits where they are worth most: mixed precision.

        What each layer costs was measured; what several cost together is taken as the sum of it, so look at the
        result with `calibrate` and `analyze` before training.

        Args:
            report: what `hf_qat.analyze` found out about a prepared and calibrated model, with sensitivities.
            budget: one of two. `{"at_least": 0.9}`: what the report's metric should be after calibration. The layers
                that cost most get 8-bit weights, 8-bit activations, 16-bit ones where the target has them (ONNX needs
                `opset_version=21` for these), and in the end float, until that is to be expected.
                `{"weight_bytes": 1e6}`: what all quantized weights may take. Those layers get 8-bit weights that gain
                most for a byte.

        Raises:
            ConfigError: not one of the two budgets, one that cannot be kept, or a report without sensitivities.

        Examples:
            Of a model that is prepared by `QATConfig("w4a4")`, with a measure of one's own::

                report = hf_qat.analyze(model, batches, metric=accuracy_of)
                config = QATConfig.from_analysis(report, budget={"at_least": 0.9})
        """
        if not isinstance(report.config, QATConfig):
            raise ConfigError("the report is of a file, which has no recipe: analyze the prepared model.")
        overrides, excluded = propose(report, report.config.target_spec.widest_activations, budget)
        changes = {
            "overrides": merged(report.config.overrides, overrides),
            "exclude": [*report.config.exclude, *excluded],
            "checkpoint": None,
        }
        return cls(**{**vars(report.config), **changes})

    @overload
    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: Literal[False] = False, **kwargs: Any
    ) -> QATConfig: ...

    @overload
    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[QATConfig, dict[str, Any]]: ...

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> QATConfig | tuple[QATConfig, dict[str, Any]]:
        """A config from what `to_dict` gave; arguments by keyword replace what the dict says.

        Args:
            config_dict: keys and values of the constructor.
            return_unused_kwargs: also return the keyword arguments that are no arguments of a config, which are an
                error otherwise.

        Raises:
            ConfigError: as the constructor; also for a dict that a newer major version wrote, and for no dict.
        """
        config = cls(**named_values("QATConfig", config_dict))
        unused = config.update(**kwargs)
        if return_unused_kwargs:
            return config, unused
        refuse_unknown("QATConfig", unused, vars(config))
        return config

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> QATConfig:
        """Read the config that was saved with a model.

        Args:
            source: a directory or a Hub repository with the model's `config.json`, or a JSON file: a model's, or one
                that `to_json_file` wrote.
            revision, token, cache_dir, local_files_only: as in `transformers.AutoConfig.from_pretrained`, for the Hub.

        Raises:
            ConfigError: there is no usable quantization config in the file.
            OSError: there is no such file or repository.
        """
        if Path(source).is_file():
            return cls(**_read_json(Path(source)))
        where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            found = cached_file(source, "config.json", **where)
        except OSError as error:
            raise OSError(f"{source} is no directory here, and not to be had from the Hub: {error}") from error
        if found is None:
            raise FileNotFoundError(f"{source} has no config.json: give the directory that the model was saved to.")
        return cls(**_read_json(Path(found)))

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change some arguments, checked as by the constructor; return those that are no arguments of a config."""
        known = {key: value for key, value in kwargs.items() if key in vars(self)}
        vars(self).update(vars(type(self)(**{**vars(self), **known})))
        return {key: value for key, value in kwargs.items() if key not in known}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Pairs, so that `dict(config)` equals `config.to_dict()`."""
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QATConfig):
            return False
        return self.with_checkpoint(None).to_dict() == other.with_checkpoint(None).to_dict()


def _matches(glob: str, path: str) -> bool:
    """Whether a glob matches a dotted path or one of its parents."""
    names = path.split(".")
    return any(fnmatchcase(".".join(names[:depth]), glob) for depth in range(len(names), 0, -1))


def _apply(
    changes: Mapping[str, dict[str, Any]], weights: TensorScheme, activations: TensorScheme
) -> tuple[TensorScheme, TensorScheme]:
    """Both schemes with the changes of one override."""
    return replace(weights, **changes.get("weights", {})), replace(activations, **changes.get("activations", {}))


def _read_json(file: Path) -> dict[str, Any]:
    """The quantization config in a JSON file, at its top or under `quantization_config`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}).") from error
    if isinstance(content, dict) and content.get("quant_method") is None:
        content = content.get("quantization_config")
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no quantization config: it belongs to a float model, or was cut short.")
    return content
